"""Validation loss against a naive one, and what an evaluation of a run finds."""

import math

import pytest
import torch
from model_helpers import naive_loss_of_windows
from run_helpers import SEQ_LEN, World
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from cocomix.data.token_files import TokenFiles
from cocomix.training.validation import Evaluation, perplexity, validation_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.add_teacher()
    assert world.train("run") == 0
    return world


@pytest.fixture(scope="module")
def split(world):
    return TokenFiles.open(world.folder / "data").split("val")


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    ).eval()


@pytest.mark.parametrize("seq_len", [SEQ_LEN, 7])
def test_validation_loss_is_the_mean_over_all_predictions(split, gpt2, seq_len):
    n_windows = split.n_windows(seq_len)
    batch = 5 if n_windows % 5 else 4  # the last batch is a smaller one
    total, count = validation_loss(gpt2, split, seq_len, batch, CPU)
    assert count == n_windows * (seq_len - 1)
    assert float(total) / count == pytest.approx(
        naive_loss_of_windows(gpt2, split, seq_len, range(n_windows)), abs=1e-6
    )


def test_the_students_loss_is_that_of_next_tokens_alone(world, split):
    model = AutoModelForCausalLM.from_pretrained(world.folder / "run/model")
    total, count = validation_loss(model, split, SEQ_LEN, 4, CPU)
    expected = naive_loss_of_windows(model, split, SEQ_LEN, range(split.n_windows(SEQ_LEN)))
    assert float(total) / count == pytest.approx(expected, abs=1e-6)
    assert world.records("run", "summary")[0]["loss"] == pytest.approx(expected, abs=1e-6)


def test_ranks_share_the_windows_without_rest_or_overlap(split, gpt2):
    whole, count = validation_loss(gpt2, split, SEQ_LEN, 4, CPU)
    parts = [validation_loss(gpt2, split, SEQ_LEN, 4, CPU, rank=rank, world=3) for rank in range(3)]
    assert sum(n for _, n in parts) == count
    assert float(sum(total for total, _ in parts)) == pytest.approx(float(whole), rel=1e-6)


def test_max_windows_reads_the_first_ones_over_all_ranks(split, gpt2):
    parts = [validation_loss(gpt2, split, SEQ_LEN, 4, CPU, max_windows=5, rank=rank, world=2) for rank in range(2)]
    assert [n for _, n in parts] == [3 * (SEQ_LEN - 1), 2 * (SEQ_LEN - 1)]
    expected = naive_loss_of_windows(gpt2, split, SEQ_LEN, range(5))
    assert float(sum(total for total, _ in parts)) / (5 * (SEQ_LEN - 1)) == pytest.approx(expected, abs=1e-6)
    assert validation_loss(gpt2, split, SEQ_LEN, 4, CPU, max_windows=10**6)[1] == split.n_windows(SEQ_LEN) * 15
    idle, none = validation_loss(gpt2, split, SEQ_LEN, 4, CPU, max_windows=1, rank=1, world=2)
    assert (float(idle), none) == (0, 0)


@pytest.mark.parametrize("max_windows", [1, 5, 9, 12])
def test_every_rank_runs_the_model_equally_often(split, gpt2, max_windows):
    """Under ZeRO-3 all ranks gather weights in each forward pass."""
    counts = []
    for rank in range(4):
        calls = []
        handle = gpt2.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        validation_loss(gpt2, split, SEQ_LEN, 2, CPU, max_windows=max_windows, rank=rank, world=4)
        handle.remove()
        counts.append(len(calls))
    assert counts == [-(-max_windows // 8)] * 4


def test_the_model_goes_back_to_the_mode_it_was_in(split, gpt2):
    dropping = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=16, n_layer=1, n_head=2)).train()
    losses = {float(validation_loss(dropping, split, SEQ_LEN, 4, CPU, max_windows=4)[0]) for _ in range(2)}
    assert len(losses) == 1 and dropping.training  # without dropout: twice the same
    validation_loss(gpt2, split, SEQ_LEN, 4, CPU, max_windows=1)
    assert not gpt2.training


def test_perplexity_overflows_to_infinity():
    assert perplexity(math.log(50)) == pytest.approx(50)
    assert perplexity(1e6) == math.inf


def test_an_evaluation_has_the_perplexity_of_its_loss():
    assert Evaluation(math.log(7)).perplexity == pytest.approx(7) and Evaluation(1.0).concepts == {}
