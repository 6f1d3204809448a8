import json
import math
import shutil

import pytest
import torch
from model_helpers import naive_loss_of_windows
from run_helpers import World
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.data.preparation import prepare
from cocomix.data.token_files import TokenFiles
from cocomix.inference.evaluate import evaluate_checkpoint

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
    assert math.log(found) == pytest.approx(naive_loss_of_windows(gpt2, split, 9, range(7)), abs=1e-6)


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
        (other / "tokenizer/cocomix_checksums.json").unlink()
    capsys.readouterr()
    assert main(["eval", *(text.replace("OUT", str(world.folder)) for text in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("cocomix eval: error: ") and error.count("\n") == 1
    assert message in error


@pytest.fixture
def tree(world, tmp_path, monkeypatch):
    """A tree with a run that was trained in it, by relative paths; it is the working directory."""
    tree = tmp_path / "tree"
    for name in ("data", "teacher", "sae"):
        shutil.copytree(world.folder / name, tree / name)
    monkeypatch.chdir(tree)
    relative = ["data.folder=data", "teacher.model=teacher", "teacher.sae=sae", "train.run=runs/run"]
    assert main(["train", str(world.config), *relative, "train.tokens=256"]) == 0
    return tree


def test_the_data_of_a_moved_run_are_found_and_no_others_are_read(tree, tmp_path, world, monkeypatch, capsys):
    perplexity = evaluate_checkpoint("runs/run")
    same_tokenizer = f"data.tokenizer={world.folder}/data/tokenizer"
    others = tmp_path / "elsewhere/data"
    prepare(world.load("data.val_fraction=0.3", same_tokenizer, f"data.folder={others}").data)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert evaluate_checkpoint("../tree/runs/run") == perplexity
    tree = tree.rename(tmp_path / "moved")
    assert evaluate_checkpoint(tree / "runs/run") == perplexity
    shutil.rmtree(tree / "data")
    capsys.readouterr()
    assert main(["eval", str(tree / "runs/run/model")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"was trained on other token files: the SHA-256 of {others}/train.bin" in error
    assert evaluate_checkpoint(tree / "runs/run", "data") != perplexity  # those that are named are read
    shutil.rmtree(others)
    assert main(["eval", str(tree / "runs/run")]) == 2
    error = capsys.readouterr().err
    assert "are gone: there are none in" in error and "name them with --data FOLDER" in error


def test_a_damaged_model_is_a_user_error(world, tmp_path):
    shutil.copytree(world.folder / "run/model", tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CocomixError, match="cannot load"):
        evaluate_checkpoint(tmp_path / "model", world.folder / "data")
