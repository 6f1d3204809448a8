from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from cocomix.core.errors import CocomixError
from cocomix.distributed.ranks import Ranks
from cocomix.distributed.training_state import held_pieces, load_pieces, read_weights, state_file_name, state_to_save

CPU = torch.device("cpu")


def replicated_engine(sizes, seed=None):
    """What the functions need of an engine at stage 0, with random weights and moments given a seed."""
    module = nn.ParameterDict({f"p{i}": nn.Parameter(torch.zeros(size)) for i, size in enumerate(sizes)})
    module = nn.ModuleDict({"m": module})
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    engine = SimpleNamespace(zero_optimization_stage=lambda: 0, module=module, basic_optimizer=optimizer)
    if seed is not None:
        torch.manual_seed(seed)
        for piece in held_pieces(engine):
            for tensor in piece.tensors.values():
                tensor.normal_()
    return engine


def save(engine, folder, world, save_id="this", only=None):
    for rank in range(world) if only is None else [only]:
        tensors = state_to_save(engine, Ranks(rank, world, CPU))
        save_file(tensors, folder / state_file_name(rank, world), {"save_id": save_id})


def load(engine, folder, saved_world, rank=0, world=1):
    load_pieces(engine, folder, "this", saved_world, 7, Ranks(rank, world, CPU))


def held(engine):
    return {(piece.name, kind): tensor for piece in held_pieces(engine) for kind, tensor in piece.tensors.items()}


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), saved_world=st.integers(1, 5), world=st.integers(1, 3)
)
@settings(max_examples=25)
def test_any_number_of_ranks_reads_what_any_other_wrote(tmp_path_factory, sizes, saved_world, world):
    folder = tmp_path_factory.mktemp("state")
    source = replicated_engine(sizes, seed=0)
    save(source, folder, saved_world)
    assert len(list(folder.iterdir())) == saved_world
    for rank in range(world):
        engine = replicated_engine(sizes)
        load(engine, folder, saved_world, rank, world)
        for key, tensor in held(source).items():
            torch.testing.assert_close(held(engine)[key], tensor, rtol=0, atol=0)
        steps = [state["step"] for state in engine.basic_optimizer.state.values()]
        assert {float(step) for step in steps} == {7}
        assert len({step.data_ptr() for step in steps}) == len(sizes)  # a shared counter would count each of them


def test_a_state_made_here_is_the_one_that_adam_makes():
    made, stepped = replicated_engine([3]), replicated_engine([3])
    list(held_pieces(made))
    [parameter] = stepped.module.parameters()
    parameter.grad = torch.zeros(3)
    stepped.basic_optimizer.step()
    [ours], [theirs] = made.basic_optimizer.state.values(), stepped.basic_optimizer.state.values()
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape, ours[key].device) == (tensor.dtype, tensor.shape, tensor.device)


def test_only_the_files_that_are_needed_are_opened(tmp_path):
    """With nothing changed, a rank reads its own file alone; its share of a parameter lies there."""
    save(replicated_engine([8], seed=0), tmp_path, 1)
    (tmp_path / "rank-00001-of-00002.safetensors").write_bytes(b"broken")
    (tmp_path / "rank-00000-of-00001.safetensors").rename(tmp_path / "rank-00000-of-00002.safetensors")
    load(replicated_engine([8]), tmp_path, 2)


@pytest.mark.parametrize("rank", range(3))
def test_a_file_that_is_missing_is_named(tmp_path, rank):
    save(replicated_engine([8], seed=0), tmp_path, 3)
    (tmp_path / f"rank-0000{rank}-of-00003.safetensors").unlink()
    with pytest.raises(CocomixError, match=f"rank-0000{rank}-of-00003.safetensors is missing"):
        load(replicated_engine([8]), tmp_path, 3)


def test_a_file_of_another_save_is_named(tmp_path):
    engine = replicated_engine([8], seed=0)
    save(engine, tmp_path, 2)
    save(engine, tmp_path, 2, "other", only=1)
    with pytest.raises(CocomixError, match="rank-00001-of-00002.safetensors belongs to another save"):
        load(replicated_engine([8]), tmp_path, 2)


@pytest.mark.parametrize("sizes", [[9], [8, 2]])
def test_a_larger_or_another_model_lacks_parts(tmp_path, sizes):
    save(replicated_engine([8], seed=0), tmp_path, 2)
    with pytest.raises(CocomixError, match="lack parts of m.p"):
        load(replicated_engine(sizes), tmp_path, 2)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4), world=st.integers(1, 5))
@settings(max_examples=15)
def test_the_weights_alone_are_read_without_an_engine(tmp_path_factory, sizes, world):
    folder = tmp_path_factory.mktemp("state")
    engine = replicated_engine(sizes, seed=0)
    save(engine, folder, world)
    weights = read_weights(folder, "this", world)
    for name, parameter in engine.module.named_parameters():
        torch.testing.assert_close(weights.pop(name), parameter.detach(), rtol=0, atol=0)
    assert not weights
    with pytest.raises(CocomixError, match="belongs to another save"):
        read_weights(folder, "other", world)
