"""Every way to split and to trade memory follows the trajectory of one process in fp32, also on several ranks."""

import functools
import json

import numpy as np
import pytest
import torch
from run_helpers import (
    SEQ_LEN,
    STEPS,
    assert_close_weights,
    assert_equal_runs,
    reference_run,
    stage,
    uneven,
)

from cocomix.core.config import TeacherConfig
from cocomix.teacher.concept_teacher import ConceptTeacher
from cocomix.teacher.extraction import run as make_labels
from cocomix.teacher.sae import SparseAutoencoder
from cocomix.training.train_step import TrainStep
from cocomix.training.trainer import Trainer

CHECKPOINTED, OFFLOADED, COMPILED = (
    f"train.{name}=true" for name in ("activation_checkpointing", "offload_optimizer", "compile")
)
BF16 = "train.precision=bf16"

# Two rounds of accumulation each: micro batches of two windows on two ranks, of one on four.
ON_TWO = {
    **{f"fp32-{number}": stage(number) for number in range(4)},
    **{f"bf16-{number}": [*stage(number), BF16] for number in (1, 2, 3)},
    "offloaded-1": [*stage(1), OFFLOADED],
    "offloaded-2-bf16": [*stage(2), OFFLOADED, BF16],
    "checkpointed-3": [*stage(3), CHECKPOINTED],
    "all-3": [*stage(3), CHECKPOINTED, OFFLOADED, COMPILED],
    "all-3-bf16": [*stage(3), CHECKPOINTED, OFFLOADED, COMPILED, BF16],
}
ON_FOUR = {
    **{f"fp32-{number}": stage(number) for number in range(4)},
    "bf16-3": [*stage(3), BF16],
    "offloaded-3": [*stage(3), OFFLOADED],
}


@pytest.fixture
def quick_compiler(monkeypatch):
    """What torch.compile does up to, but without, generating code."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def assert_follows_plain_pytorch(world, run, loss_atol=1e-5, weight_atol=1e-5, norm_rtol=1e-4):
    losses, rates, norms, state = plain_pytorch(world)
    np.testing.assert_allclose(world.losses(run), losses, rtol=0, atol=loss_atol)
    np.testing.assert_allclose(world.losses(run, "lr"), rates, rtol=1e-12)
    np.testing.assert_allclose(world.losses(run, "grad_norm"), norms, rtol=norm_rtol)
    weights = world.weights(run)
    assert_close_weights(weights, {name: state[name] for name in weights}, atol=weight_atol)


_REFERENCE = {}


def plain_pytorch(world):
    """The method in plain PyTorch, in fp32 and on whole batches; computed once a world."""
    if world.folder not in _REFERENCE:
        _REFERENCE[world.folder] = reference_run(world, *uneven(world))
        assert min(_REFERENCE[world.folder][2]) > 1  # clipping is at work
    return _REFERENCE[world.folder]


# ---------------------------------------------------------------------------------------------- one process


@pytest.mark.parametrize(
    "settings",
    [
        [*stage(0), CHECKPOINTED],
        [*stage(3), CHECKPOINTED],
        [*stage(1), OFFLOADED],
        [*stage(2), OFFLOADED],
        [*stage(3), OFFLOADED],
    ],
    ids=lambda settings: f"{settings[0]}-{settings[-1]}",
)
def test_what_saves_memory_follows_plain_pytorch(world, settings):
    run = f"saving-{settings[0][-1]}-{settings[-1][6:9]}"
    assert world.train(run, *uneven(world), *settings, "train.micro_batch=2") == 0
    assert_follows_plain_pytorch(world, run)


def test_checkpointed_blocks_are_computed_again_in_the_backward_pass(world, monkeypatch):
    calls = []
    step = TrainStep.__call__

    def counted(self, batches):
        handle = self.engine.module.transformer.h[0].attn.register_forward_hook(lambda *_: calls.append(1))
        sums = step(self, batches)
        handle.remove()
        return sums

    monkeypatch.setattr(TrainStep, "__call__", counted)
    for run, more, expected in (("kept", [], 1), ("again", [CHECKPOINTED], 2)):
        calls.clear()
        assert world.train(run, *uneven(world), "train.micro_batch=8", *more) == 0
        assert len(calls) == expected * STEPS


def test_offloading_reaches_deepspeed(world, monkeypatch):
    seen = []
    finish = Trainer._finish

    def look(self, log):
        seen.append(self.engine.zero_cpu_offload())
        return finish(self, log)

    monkeypatch.setattr(Trainer, "_finish", look)
    assert world.train("not-offloaded", *uneven(world), "train.tokens=128") == 0
    assert world.train("offloaded", *uneven(world), "train.tokens=128", OFFLOADED) == 0
    assert seen == [False, True]


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 3])
def test_compiled_blocks_follow_plain_pytorch_in_whole_graphs(world, quick_compiler, number):
    assert world.train(f"compiled-{number}", *uneven(world), *stage(number), COMPILED, "train.micro_batch=2") == 0
    assert_follows_plain_pytorch(world, f"compiled-{number}")
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    # three kinds of block (T, 2T, concept queries only), each with gradients, and without on whole and partial batches
    assert counters["stats"]["unique_graphs"] == 9


@pytest.mark.slow
def test_generated_code_follows_plain_pytorch(world):
    torch.compiler.reset()
    fewer = ["train.micro_batch=4", "train.eval_windows=4"]  # graphs, without partial batches
    assert world.train("inductor", *uneven(world), *stage(3), COMPILED, *fewer) == 0
    assert_follows_plain_pytorch(world, "inductor")


# ---------------------------------------------------------------------------------------------- the teacher beside it


@pytest.fixture(scope="module")
def linear_teacher(world):
    """A teacher in bf16 whose blocks are linear layers with biases, and a cache of its labels; as overrides."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    torch.manual_seed(0)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=300,
            max_position_embeddings=SEQ_LEN,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=128,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(world.folder / "linear-teacher")
    decoder = torch.nn.functional.normalize(torch.randn(64, 32), dim=1)
    SparseAutoencoder(decoder.clone(), torch.zeros(64), torch.zeros(32), decoder, 4, normalize=True).save(
        world.folder / "linear-sae"
    )
    overrides = [
        f"teacher.model={world.folder}/linear-teacher",
        f"teacher.sae={world.folder}/linear-sae",
        "teacher.dtype=bf16",
        "teacher.layer=2",
    ]
    make_labels(world.load(f"concept_labels.cache={world.folder}/linear-labels", *overrides))
    return overrides


def test_a_bf16_teacher_gives_the_same_labels_beside_stage_3(world, linear_teacher):
    linear = torch.nn.functional.linear
    assert world.train("beside-3", *linear_teacher, *stage(3)) == 0
    assert torch.nn.functional.linear is linear
    assert (
        world.train("cached-3", *linear_teacher, f"concept_labels.cache={world.folder}/linear-labels", *stage(3)) == 0
    )
    assert_equal_runs(world, "beside-3", "cached-3")


def test_the_label_test_would_see_deepspeeds_own_linear_function(world, linear_teacher):
    """What `memory_efficient_linear` puts in place of torch's does change this teacher's labels."""
    from deepspeed.runtime.zero.linear import zero3_linear_wrap

    teacher = ConceptTeacher.from_config(
        TeacherConfig(f"{world.folder}/linear-teacher", f"{world.folder}/linear-sae", layer=2, dtype="bf16"),
        torch.device("cpu"),
    )
    ids = torch.arange(300)[: 18 * SEQ_LEN].reshape(-1, SEQ_LEN)
    expected = teacher.labels(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", zero3_linear_wrap)
        assert (teacher.labels(ids) != expected).any()


def test_the_teacher_stays_whole_beside_stage_3(world, monkeypatch):
    seen = []
    finish = Trainer._finish

    def look(self, log):
        own = list(self.engine.module.parameters())
        assert all(parameter.numel() == 0 and parameter.ds_numel > 0 for parameter in own)
        seen.extend(self.supervision.teachers["labels"].model.parameters())
        return finish(self, log)

    monkeypatch.setattr(Trainer, "_finish", look)
    assert world.train("whole-teacher", *stage(3), "train.tokens=128") == 0
    assert seen and not any(hasattr(parameter, "ds_id") or parameter.numel() == 0 for parameter in seen)


# ---------------------------------------------------------------------------------------------- several processes


@pytest.fixture(scope="module")
def on_two(world):
    world.train_on(
        2,
        {
            f"two-{name}": [*uneven(world), "train.micro_batch=2", "train.keep_checkpoints=3", *more]
            for name, more in ON_TWO.items()
        },
    )
    return world


@pytest.fixture(scope="module")
def on_four(world):
    # five windows of evaluation: one rank has two, the others have one
    world.train_on(
        4,
        {
            f"four-{name}": [*uneven(world), "train.micro_batch=1", "train.eval_windows=5", *more]
            for name, more in ON_FOUR.items()
        },
    )
    return world


def world_size(world, run):
    return json.loads((world.folder / run / "run.json").read_text())["world_size"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, more in ON_TWO.items() if BF16 not in more])
def test_two_ranks_follow_plain_pytorch(on_two, name):
    assert world_size(on_two, f"two-{name}") == 2
    assert_follows_plain_pytorch(on_two, f"two-{name}")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, more in ON_FOUR.items() if BF16 not in more])
def test_four_ranks_follow_plain_pytorch(on_four, name):
    assert world_size(on_four, f"four-{name}") == 4
    assert_follows_plain_pytorch(on_four, f"four-{name}")


@pytest.mark.slow
def test_all_ranks_and_stages_evaluate_alike(on_two, on_four):
    def evaluations(run):
        return [record["loss"] for record in on_two.records(run, "eval")]

    assert on_two.train("evaluated", *uneven(on_two)) == 0
    assert on_two.train("evaluated-five", *uneven(on_two), "train.eval_windows=5") == 0
    for number in range(4):
        np.testing.assert_allclose(evaluations(f"two-fp32-{number}"), evaluations("evaluated"), rtol=0, atol=1e-5)
        np.testing.assert_allclose(evaluations(f"four-fp32-{number}"), evaluations("evaluated-five"), rtol=0, atol=1e-5)


def assert_near_in_bf16(world, run):
    """The bound for bf16 with fp32 masters over these 12 steps: losses near 5.8 within 0.002 of fp32."""
    # Adam moves an entry by up to lr a step whatever its gradient's size, so near-zero gradients may part
    assert_follows_plain_pytorch(world, run, loss_atol=2e-3, weight_atol=1e-3 * STEPS, norm_rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, more in ON_TWO.items() if BF16 in more])
def test_two_ranks_in_bf16_stay_near_plain_pytorch_in_fp32(on_two, name):
    assert_near_in_bf16(on_two, f"two-{name}")


@pytest.mark.slow
def test_four_ranks_in_bf16_stay_near_plain_pytorch_in_fp32(on_four):
    assert_near_in_bf16(on_four, "four-bf16-3")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16-1", "bf16-2", "bf16-3", "offloaded-2-bf16"])
def test_gradients_of_micro_batches_and_ranks_are_summed_in_fp32(on_two, name):
    """Before any weight has moved there is only that sum; in bf16 its norm would be off by 1e-4."""
    run = f"summed-{name}"
    assert on_two.train(run, *uneven(on_two), *ON_TWO[name], "train.micro_batch=2", f"train.tokens={8 * SEQ_LEN}") == 0
    one, two = (on_two.losses(run, "grad_norm")[0] for run in (run, f"two-{name}"))
    assert two == pytest.approx(one, rel=1e-6)
