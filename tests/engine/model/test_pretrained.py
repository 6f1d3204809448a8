"""A language model is loaded whole or not at all: nothing in it is made up, and what is left aside is said."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import CoCoMixConfig, CoCoMixForCausalLM
from cocomix.core import output
from cocomix.core.errors import CocomixError
from cocomix.core.manifest import write_manifest
from cocomix.model.pretrained import load_language_model


@pytest.fixture(autouse=True)
def nothing_said_before(monkeypatch):
    monkeypatch.setattr(output, "_noted", set())


@pytest.fixture
def folder(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=30, n_positions=8, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    return tmp_path


def said(capsys) -> str:
    """What standard error got beside progress bars."""
    return "\n".join(line for line in capsys.readouterr().err.splitlines() if "|" not in line)


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_weights_that_are_missing_are_not_made_up(folder, capsys):
    change_weights(folder, lambda weights: weights.pop("transformer.h.0.mlp.c_fc.weight"))
    with pytest.raises(CocomixError, match=r"do not fit its config: transformer\.h\.0\.mlp\.c_fc\.weight is missing"):
        load_language_model(folder)
    assert said(capsys) == ""


def test_weights_of_another_shape_are_named_in_one_line(folder, capsys):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": 9}))
    with pytest.raises(CocomixError, match=r"transformer\.wpe\.weight has shape \[8, 8\] and should have \[9, 8\]"):
        load_language_model(folder)
    assert said(capsys) == ""


def test_weights_without_a_place_are_left_aside_and_said(folder, capsys):
    whole = load_language_model(folder).state_dict()
    change_weights(folder, lambda weights: weights.update(classifier=torch.ones(3)))
    loaded = load_language_model(folder).state_dict()
    assert all(torch.equal(loaded[name], whole[name]) for name in whole)
    assert "classifier" in said(capsys)


def test_a_model_that_is_not_as_its_manifest_says_is_refused(folder):
    write_manifest(folder)
    load_language_model(folder)
    change_weights(folder, lambda weights: weights["transformer.wpe.weight"].view(-1)[:1].add_(1))
    with pytest.raises(CocomixError, match=r"model\.safetensors is damaged"):
        load_language_model(folder)


def test_an_own_model_without_checksums_is_loaded_and_said_once(tmp_path, capsys):
    settings = {"vocab_size": 30, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 1}
    concepts = {"concept_dim": 4, "concept_topk": 2, "insert_layer": 1}
    CoCoMixForCausalLM(CoCoMixConfig(**settings, **concepts)).save_pretrained(tmp_path)
    for _ in range(2):
        load_language_model(tmp_path)
    assert said(capsys).count("comes without checksums") == 1
    write_manifest(tmp_path)
    load_language_model(tmp_path)
    assert said(capsys) == ""
