import json
import pickle
import shutil

import pytest
import torch
from model_helpers import DATA, GOLDEN_SETTINGS, golden, golden_model, golden_state, gradients
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from cocomix import CoCoMixForCausalLM
from cocomix.core.errors import CocomixError

CHECKPOINT = DATA / "reference_checkpoint"


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the published checkpoint that a test may damage."""
    return shutil.copytree(CHECKPOINT, tmp_path / "checkpoint")


def gpt2(**settings):
    config = GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=37, n_positions=20, **settings)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def token_ids(vocab_size=37):
    return torch.randint(vocab_size, (3, 11))


# --- the paper's public code


def test_a_published_checkpoint_gives_the_published_logits():
    model = CoCoMixForCausalLM.from_reference(CHECKPOINT, **GOLDEN_SETTINGS)
    from_state, expected = golden_model()
    assert_close(model(expected["input_ids"]).logits, expected["logits"], rtol=1e-4, atol=1e-4)
    for name, value in from_state.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    config = model.config
    assert (config.n_head, config.n_positions, config.concept_dim, config.insert_layer) == (4, 24, 96, 1)
    assert (config.mixing, config.bos_token_id, config.eos_token_id) == ("interleave", 0, 0)
    assert not model.training


def test_a_checkpoint_in_torchs_format_loads_too(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    model = CoCoMixForCausalLM.from_reference(str(checkpoint), **GOLDEN_SETTINGS)
    expected = CoCoMixForCausalLM.from_reference(CHECKPOINT, **GOLDEN_SETTINGS)
    assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_the_given_state_dict_stays_as_it_is():
    state = golden_state(golden("model")[0])
    names, shape = set(state), state["transformer.compress_layer.weight"].shape
    CoCoMixForCausalLM.from_reference(state, n_head=4, **GOLDEN_SETTINGS)
    assert set(state) == names
    assert state["transformer.compress_layer.weight"].shape == shape


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"concept_dim": 97}, "holds 96 concepts but concept_dim is 97"),
        ({"insert_layer": 3}, r"insert_layer \(3\)"),
        ({"concept_topk": 97}, r"concept_topk \(97\)"),
        ({"n_head": 5}, r"n_head \(5\)"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint_are_refused(settings, message):
    with pytest.raises(CocomixError, match=message):
        CoCoMixForCausalLM.from_reference(CHECKPOINT, **{**GOLDEN_SETTINGS, **settings})


def test_a_bare_state_dict_needs_the_number_of_heads():
    with pytest.raises(CocomixError, match="pass n_head"):
        CoCoMixForCausalLM.from_reference(golden_state(golden("model")[0]), **GOLDEN_SETTINGS)


def test_a_checkpoint_of_something_else_is_named(tmp_path):
    gpt2().save_pretrained(tmp_path)
    with pytest.raises(CocomixError, match=f"{tmp_path}.*not a checkpoint of the public CoCoMix code.*compress_layer"):
        CoCoMixForCausalLM.from_reference(tmp_path, **GOLDEN_SETTINGS)


@pytest.mark.parametrize("name", ["transformer.pre_bias", "transformer.h.1.mlp.c_fc.weight"])
def test_a_missing_weight_is_named(name):
    state = golden_state(golden("model")[0])
    del state[name]
    with pytest.raises(CocomixError, match=name):
        CoCoMixForCausalLM.from_reference(state, n_head=4, **GOLDEN_SETTINGS)


def test_a_missing_folder_and_missing_weights_are_named(tmp_path, checkpoint):
    with pytest.raises(CocomixError, match=f"there is no {tmp_path / 'nowhere' / 'config.json'}"):
        CoCoMixForCausalLM.from_reference(tmp_path / "nowhere", **GOLDEN_SETTINGS)
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CocomixError, match=r"holds no weights: expected model\.safetensors or pytorch_model\.bin"):
        CoCoMixForCausalLM.from_reference(checkpoint, **GOLDEN_SETTINGS)


def test_a_truncated_weights_file_is_named(checkpoint):
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CocomixError, match=str(path)):
        CoCoMixForCausalLM.from_reference(checkpoint, **GOLDEN_SETTINGS)


class Harmful:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("content", [pickle.dumps({"a": Harmful()}, protocol=2), b"no file of torch"])
def test_a_weights_file_is_never_unpickled(checkpoint, monkeypatch, content):
    monkeypatch.chdir(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CocomixError, match=r"pytorch_model\.bin"):
        CoCoMixForCausalLM.from_reference(checkpoint, **GOLDEN_SETTINGS)
    assert not (checkpoint / "executed").exists()


# --- GPT-2


@pytest.mark.parametrize("source", ["model", "folder"])
@pytest.mark.parametrize("settings", [{}, {"layer_norm_epsilon": 1e-2}, {"tie_word_embeddings": False}])
def test_mixing_none_is_gpt2(tmp_path, source, settings):
    original = gpt2(**settings, bos_token_id=1, eos_token_id=2)
    original.save_pretrained(tmp_path)
    model = CoCoMixForCausalLM.from_gpt2(original if source == "model" else tmp_path)
    assert model.config.mixing == "none"
    assert (model.config.bos_token_id, model.config.eos_token_id) == (1, 2)
    ids = token_ids()
    expected = original(ids, labels=ids)
    out = model(ids, labels=ids, return_logits=True)
    assert_close(out.logits, expected.logits, rtol=1e-5, atol=1e-5)
    assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    expected.loss.backward()
    reference = gradients(original)
    actual = gradients(model)
    assert set(actual) == set(reference)
    for name, gradient in actual.items():
        assert_close(gradient, reference[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_copy_does_not_share_memory_with_the_original():
    original = gpt2()
    model = CoCoMixForCausalLM.from_gpt2(original)
    before = original.transformer.wpe.weight.clone()
    with torch.no_grad():
        model.transformer.wpe.weight.zero_()
    assert torch.equal(original.transformer.wpe.weight, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"activation_function": "gelu"}, "activation_function=gelu"),
        ({"n_inner": 24}, "n_inner=24"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
    ],
)
def test_variants_of_gpt2_are_refused_by_name(settings, message):
    with pytest.raises(CocomixError, match=f"variant of GPT-2 that is not supported: {message}"):
        CoCoMixForCausalLM.from_gpt2(gpt2(**settings))


def llama():
    return LlamaForCausalLM(
        LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=37)
    )


@pytest.mark.parametrize("source", ["model", "folder"])
def test_another_architecture_is_refused(tmp_path, source):
    llama().save_pretrained(tmp_path)
    with pytest.raises(CocomixError, match="is a llama model; from_gpt2 takes GPT-2 only"):
        CoCoMixForCausalLM.from_gpt2(llama() if source == "model" else tmp_path)


def test_a_gpt2_without_a_head_is_refused():
    with pytest.raises(CocomixError, match="from_gpt2 takes a causal language model"):
        CoCoMixForCausalLM.from_gpt2(gpt2().transformer)


def test_a_missing_or_broken_gpt2_is_named(tmp_path):
    with pytest.raises(CocomixError, match=f"{tmp_path / 'nowhere'}"):
        CoCoMixForCausalLM.from_gpt2(tmp_path / "nowhere")
    gpt2().save_pretrained(tmp_path)
    for name, content in [("model.safetensors", "cut off"), ("config.json", json.dumps({"model_type": "none"}))]:
        (tmp_path / name).write_text(content)
        with pytest.raises(CocomixError, match=f"cannot load a causal language model from {tmp_path}: "):
            CoCoMixForCausalLM.from_gpt2(tmp_path)
