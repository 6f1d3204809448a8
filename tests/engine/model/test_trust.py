"""What lies beside a model is data: none of it is run, nothing is unpickled, and bare names do not reach the hub."""

import io
import json
import pickle
import shutil
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.data.tokenizer import load_tokenizer
from cocomix.model.pretrained import load_language_model

EVIL = """
from pathlib import Path
Path({trace!r}).write_text("it ran")
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
class EvilConfig(GPT2Config):
    model_type = "evil"
class EvilModel(GPT2LMHeadModel):
    config_class = EvilConfig
class EvilTokenizer(PreTrainedTokenizerFast):
    pass
"""


class Trace:
    """Leaves a trace where it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A sound model; whoever is asked whether code may run says yes."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(
        tmp_path / "model"
    )
    return tmp_path / "model"


def ask_for_code(folder, model_type, trace):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": model_type}
    config["auto_map"] = {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.EvilModel"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(EVIL.format(trace=str(trace)))


def test_code_beside_a_model_of_an_unknown_kind_is_not_run(folder, tmp_path, capsys):
    ask_for_code(folder, "evil", tmp_path / "trace")
    with pytest.raises(CocomixError) as error:
        load_language_model(folder)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    for command in (["generate", str(folder), "--prompt", "x"], ["export", str(folder), str(tmp_path / "out")]):
        assert main(command) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "trace").exists()


def test_code_beside_a_model_of_a_known_kind_is_not_run_and_that_is_said(folder, tmp_path, capsys):
    ask_for_code(folder, "gpt2", tmp_path / "trace")
    assert type(load_language_model(folder)) is GPT2LMHeadModel
    assert f"note: {folder} asks for code of its own to be run; it is not" in capsys.readouterr().err
    assert not (tmp_path / "trace").exists()


def test_code_beside_a_tokenizer_is_not_run(folder, tmp_path):
    settings = {"tokenizer_class": "EvilTokenizer", "auto_map": {"AutoTokenizer": ["evil.EvilTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(EVIL.format(trace=str(tmp_path / "trace")))
    with pytest.raises(CocomixError) as error:
        load_tokenizer(str(folder))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("evil", [True, False])
def test_nothing_is_unpickled(folder, tmp_path, evil):
    (folder / "model.safetensors").unlink()
    trace = tmp_path / "trace"
    if evil:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trace(trace)))
    else:
        torch.save({"x": torch.zeros(2)}, folder / "pytorch_model.bin")
    with pytest.raises(CocomixError, match="safetensors") as error:
        load_language_model(folder)
    assert "\n" not in str(error.value) and not trace.exists()


def test_a_folder_of_another_working_directory_is_not_looked_for_on_the_hub(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name, **_: asked.append(name))
    monkeypatch.chdir(tmp_path)
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(CocomixError, match="there is no folder runs/teacher; for what has this name on the"):
        load_language_model("runs/teacher")
    assert asked == []
