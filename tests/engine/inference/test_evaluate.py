import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from run_helpers import SEQ_LEN, World
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.data.token_files import TokenFiles
from cocomix.inference.evaluate import evaluate_checkpoint
from cocomix.training.validation import perplexity, validation_loss

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


@torch.no_grad()
def naive_loss(model, split, seq_len, windows):
    """Mean over every prediction of every window, from logits."""
    ids = torch.from_numpy(np.stack([split.window(i, seq_len) for i in windows]))
    logits = model(ids).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()))


@pytest.mark.parametrize("seq_len", [SEQ_LEN, 7])
def test_validation_loss_is_the_mean_over_all_predictions(split, gpt2, seq_len):
    n_windows = split.n_windows(seq_len)
    batch = 5 if n_windows % 5 else 4  # the last batch is a smaller one
    total, count = validation_loss(gpt2, split, seq_len, batch, CPU)
    assert count == n_windows * (seq_len - 1)
    assert float(total) / count == pytest.approx(naive_loss(gpt2, split, seq_len, range(n_windows)), abs=1e-6)


def test_the_students_loss_is_that_of_next_tokens_alone(world, split):
    model = AutoModelForCausalLM.from_pretrained(world.folder / "run/model")
    total, count = validation_loss(model, split, SEQ_LEN, 4, CPU)
    expected = naive_loss(model, split, SEQ_LEN, range(split.n_windows(SEQ_LEN)))
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
    expected = naive_loss(gpt2, split, SEQ_LEN, range(5))
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


def test_a_checkpoint_is_a_run_a_model_or_one_of_its_checkpoints(world, capsys):
    summary = world.records("run", "summary")[0]["perplexity"]
    step_8 = next((world.folder / "run/checkpoints").glob("*08"))
    assert evaluate_checkpoint(world.folder / "run") == pytest.approx(summary, rel=1e-6)
    assert evaluate_checkpoint(str(world.folder / "run/model")) == pytest.approx(summary, rel=1e-6)
    assert evaluate_checkpoint(step_8) > summary
    assert f"{step_8}: validation loss" in capsys.readouterr().out


def test_an_unfinished_run_means_its_latest_checkpoint(world):
    unfinished = world.folder / "unfinished"
    shutil.copytree(world.folder / "run", unfinished)
    shutil.rmtree(unfinished / "model")
    assert evaluate_checkpoint(unfinished) == pytest.approx(evaluate_checkpoint(world.folder / "run"), rel=1e-6)


def test_any_transformers_folder_can_be_read_with_other_data_and_shorter_windows(world, gpt2, split, tmp_path):
    gpt2.save_pretrained(tmp_path / "gpt2")
    found = evaluate_checkpoint(tmp_path / "gpt2", world.folder / "data", seq_len=9, batch=3, windows=7)
    assert math.log(found) == pytest.approx(naive_loss(gpt2, split, 9, range(7)), abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["OUT/text"], "holds no model"),
        (["OUT/nowhere"], "holds no model"),
        (["OUT/teacher"], "does not lie in the folder of a run: name the token files with --data"),
        (["OUT/teacher-small", "--data", "OUT/data"], "use 300 ids but the model knows 50"),
        (["OUT/run", "--data", "OUT/text"], "is missing"),
        (["OUT/run", "--data", "OUT/data-other"], "was trained with another tokenizer"),
        (["OUT/run", "--seq-len", "17"], "--seq-len is 17: this model takes windows of 2 to 16 tokens"),
        (["OUT/run", "--seq-len", "0"], "--seq-len is 0"),
        (["OUT/run", "--seq-len", "1"], "--seq-len is 1"),
        (["OUT/run", "--batch", "0"], "--batch is 0"),
        (["OUT/run", "--windows", "-1"], "--windows -1"),
    ],
)
def test_what_does_not_fit_is_one_line_and_exit_code_2(world, capsys, arguments, message):
    if not (world.folder / "teacher-small").exists():
        world.add_teacher("teacher-small", "sae-small", vocab_size=50)
    other = world.folder / "data-other"
    if not other.exists():  # as many ids, other meanings
        shutil.copytree(world.folder / "data", other)
        file = other / "tokenizer/tokenizer.json"
        content = json.loads(file.read_text())
        content["model"]["vocab"] |= {"A": content["model"]["vocab"]["B"], "B": content["model"]["vocab"]["A"]}
        file.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["eval", *(text.replace("OUT", str(world.folder)) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cocomix eval: error: ") and error.count("\n") == 1
    assert message in error


def test_a_damaged_model_is_a_user_error(world, tmp_path):
    shutil.copytree(world.folder / "run/model", tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CocomixError, match="cannot load"):
        evaluate_checkpoint(tmp_path / "model", world.folder / "data")
