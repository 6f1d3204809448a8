import hashlib

import pytest
import torch
from kernel_helpers import set_chunk_bytes, trace
from model_helpers import DATA, autoencoder, golden, golden_state, small_model
from torch.testing import assert_close
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from cocomix import CoCoMixForCausalLM, ConceptTeacher, SparseAutoencoder
from cocomix.core.config import TeacherConfig
from cocomix.core.errors import CocomixError
from cocomix.core.flops import labels_online
from cocomix.core.shapes import TeacherShape
from cocomix.model.pretrained import fingerprint, load_language_model
from cocomix.teacher.language_model import residual_stream

N_LAYERS, WIDTH, VOCABULARY = 4, 16, 43
_SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=2,
    max_position_embeddings=32,
)
ARCHITECTURES = {
    "gpt2": lambda **more: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=N_LAYERS, n_head=2, n_positions=32, **more)
    ),
    "llama": lambda **more: LlamaForCausalLM(LlamaConfig(**_SHARED, intermediate_size=24, **more)),
    "gpt_neox": lambda **more: GPTNeoXForCausalLM(GPTNeoXConfig(**_SHARED, intermediate_size=24, **more)),
    "qwen2": lambda **more: Qwen2ForCausalLM(
        Qwen2Config(**_SHARED, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=True, **more)
    ),
}
architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)


def language_model(architecture="gpt2", **settings):
    model = ARCHITECTURES[architecture](**settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def windows(n_rows=3, length=10, vocabulary=VOCABULARY):
    return torch.randint(vocabulary, (n_rows, length))


def ranked(attribution, label_topk):
    """The indices of the largest strictly positive entries of the last dimension, -1 where there are none."""
    best, indices = attribution.sort(dim=-1, descending=True, stable=True)
    return torch.where(best > 0, indices, -1)[..., :label_topk]


def dense_labels(model, sae, layer, label_topk, ids):
    """Labels of one window by the book: dense autograd through the whole model, dense latents, dense decoder."""
    hidden = model(ids, labels=ids, output_hidden_states=True)
    x = hidden.hidden_states[layer + 1]
    (gradient,) = torch.autograd.grad(hidden.loss, x)
    mean = x.mean(-1, keepdim=True)
    normalised = (x - mean) / ((x - mean).std(-1, keepdim=True) + 1e-5)
    pre_activations = (normalised - sae.pre_bias) @ sae.W_enc.T + sae.latent_bias
    kept = pre_activations.topk(sae.k, -1)
    latents = torch.zeros_like(pre_activations).scatter(-1, kept.indices, kept.values.relu())
    return ranked(latents * (gradient @ sae.decoder.T), label_topk)


# --- the published implementation's numbers


def golden_teacher():
    values, config = golden("attribution")
    model = GPT2LMHeadModel(
        GPT2Config(
            **{key: config[key] for key in ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions")},
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
        )
    )
    model.load_state_dict(golden_state(values), strict=False)
    model.tie_weights()
    teacher = ConceptTeacher(model, SparseAutoencoder.load(DATA / "sae_golden.pt"), config["layer"], 4)
    return teacher, {key: torch.from_numpy(value) for key, value in values.items()}


def test_attribution_and_labels_are_those_of_the_papers_implementation(monkeypatch):
    teacher, expected = golden_teacher()
    ids, attribution = expected["input_ids"], expected["attribution"]
    seen = []

    def spy(values, indices, gradient, decoder, label_topk):
        latents = torch.zeros(len(values), len(decoder)).scatter(1, indices, values)
        seen.append((latents, latents * (gradient @ decoder.T)))
        return original(values, indices, gradient, decoder, label_topk)

    import cocomix.teacher.concept_teacher

    original = cocomix.teacher.concept_teacher.concept_attribution
    monkeypatch.setattr(cocomix.teacher.concept_teacher, "concept_attribution", spy)
    monkeypatch.setattr("cocomix.teacher.language_model._WINDOWS_PER_PASS", {"cpu": len(ids)})  # its loss is the mean
    labels = teacher.labels(ids)
    latents, actual = (t.detach().unflatten(0, ids.shape) for t in seen[0])
    assert_close(latents, expected["latents"], rtol=1e-4, atol=1e-4)
    scale = attribution.abs().max()
    assert_close(actual / scale, attribution / scale, rtol=1e-4, atol=1e-4)
    full = (attribution > 0).sum(-1) >= 4
    assert full.sum() > 20
    assert torch.equal(labels[full], expected["labels"][full])
    assert torch.equal(labels, ranked(attribution, 4))
    assert (labels[:, -1] == -1).all()


def test_one_window_at_a_time_gives_the_labels_of_the_whole_batch():
    teacher, expected = golden_teacher()
    assert torch.equal(teacher.labels(expected["input_ids"]), ranked(expected["attribution"], 4))


# --- labels and residual stream of several architectures


@architectures
@pytest.mark.parametrize("layer", [0, 2])
def test_labels_equal_dense_attribution(architecture, layer):
    model, sae = language_model(architecture).double().eval(), autoencoder().double()
    ids = windows()
    expected = torch.cat([dense_labels(model, sae, layer, 4, row) for row in ids.split(1)])
    actual = ConceptTeacher(model, sae, layer, 4).labels(ids)
    assert actual.dtype == torch.int64
    assert torch.equal(actual, expected)
    assert (actual[:, :-1, 0] >= 0).any()
    assert (actual[:, -1] == -1).all()


def test_the_last_block_may_be_read_too():
    model, sae = language_model().double().eval(), autoencoder().double()
    labels = ConceptTeacher(model, sae, N_LAYERS - 1, 4).labels(windows())
    assert (labels[:, :-1, 0] >= 0).any()
    assert (labels[:, -1] == -1).all()


@architectures
def test_the_residual_stream_is_the_blocks_output(architecture):
    model, ids = language_model(architecture).eval(), windows()
    hidden = model(ids, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):  # transformers shows the last one after the final norm only
        assert_close(residual_stream(model, layer, ids), hidden[layer + 1].detach())


def test_the_residual_stream_runs_no_block_after_it():
    model, ran = language_model().eval(), []
    for number, block in enumerate(model.transformer.h):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    out = residual_stream(model, 1, windows())
    assert ran[:2] == [0, 1] and 2 not in ran
    assert not out.requires_grad
    residual_stream(model, 1, windows())
    assert len(model.transformer.h[1]._forward_hooks) == 1  # only this test's


def test_a_plain_cocomix_model_serves_as_a_teacher_as_gpt2_does():
    original, sae, ids = language_model().eval(), autoencoder(), windows()
    plain = CoCoMixForCausalLM.from_gpt2(original)
    assert_close(residual_stream(plain, 1, ids), residual_stream(original, 1, ids))
    assert torch.equal(ConceptTeacher(plain, sae, 1, 4).labels(ids), ConceptTeacher(original, sae, 1, 4).labels(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_labels_do_not_depend_on_the_batch_around_a_window(dtype):
    teacher = ConceptTeacher(language_model().to(dtype), autoencoder().to(dtype), 1, 4)
    ids = windows(n_rows=5)
    together = teacher.labels(ids)
    for row in range(5):
        assert torch.equal(teacher.labels(ids[row : row + 1])[0], together[row])
    assert torch.equal(teacher.labels(ids.flip(0)).flip(0), together)


def test_where_several_windows_go_through_at_once_a_part_is_filled_up(monkeypatch):
    teacher, ids, shapes = ConceptTeacher(language_model(), autoencoder(), 1, 4), windows(n_rows=5), set()
    monkeypatch.setattr("cocomix.teacher.language_model._WINDOWS_PER_PASS", {"cpu": 4})
    teacher.model.transformer.wte.register_forward_pre_hook(lambda _module, args: shapes.add(tuple(args[0].shape)))
    labels = teacher.labels(ids)
    assert labels.shape == (5, 10, 4)
    assert shapes == {(4, 10)}
    assert torch.equal(teacher.labels(ids[4:])[0], labels[4])


def test_fewer_positive_attributions_than_labels_leave_minus_one():
    labels = ConceptTeacher(language_model(), autoencoder(k=3), 1, 6).labels(windows())
    assert labels.shape == (3, 10, 6)
    assert (labels[..., 3:] == -1).all()
    present = labels >= 0
    assert (present[..., 1:] <= present[..., :-1]).all()  # none after a missing one


def test_a_window_of_one_token_has_no_labels():
    assert (ConceptTeacher(language_model(), autoencoder(), 1, 4).labels(windows(length=1)) == -1).all()


# --- what is not computed


def test_nothing_of_the_teacher_gets_a_gradient_and_early_blocks_have_no_graph():
    model, graph = language_model(), []
    teacher = ConceptTeacher(model, autoencoder(), 2, 4)
    for block in model.transformer.h[:2]:
        block.register_forward_hook(lambda _module, _args, output: graph.append(output.requires_grad))
    teacher.labels(windows())
    assert graph and not any(graph)
    for parameter in [*model.parameters(), *teacher.sae.parameters()]:
        assert parameter.grad is None and not parameter.requires_grad
    assert not model.training and not teacher.sae.training
    assert all(not block._forward_hooks for block in model.transformer.h[2:])


@pytest.mark.parametrize("layer", [0, 2, 3])
def test_the_arithmetic_is_the_least_that_labels_need(layer):
    width, vocabulary, n_latents, ids = 64, 300, 256, windows(2, 32, 300)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_embd=width, n_layer=4, n_head=2, n_positions=32))
    teacher = ConceptTeacher(model, autoencoder(width, n_latents), layer, 4)
    products, *_ = trace(lambda: teacher.labels(ids))
    # Products with weights; attention runs in a library's kernel, whose share vanishes at zero length.
    expected = ids.numel() * labels_online(TeacherShape(width, 4, layer, vocabulary, n_latents), seq_len=0)
    sampled_dots = ids.numel() * teacher.sae.k * width
    assert sum(products.values()) - sampled_dots == pytest.approx(expected, rel=0.03)


def test_neither_vocabulary_nor_latents_are_held_for_all_tokens(monkeypatch):
    set_chunk_bytes(monkeypatch, 2**18)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=2048, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=1024))
    teacher, ids = ConceptTeacher(model, autoencoder(n_latents=2048), 0, 4), windows(1, 1024, 2048)
    _, _, largest = trace(lambda: teacher.labels(ids))
    assert largest < ids.numel() * 2048 * 4 / 3


# --- what is refused


@pytest.mark.parametrize("layer", [-1, 4, 99])
def test_a_block_that_the_teacher_lacks_is_refused(layer):
    with pytest.raises(CocomixError, match=f"teacher.layer is {layer} but the teacher has blocks 0 to 3"):
        ConceptTeacher(language_model(), autoencoder(), layer, 4)


def test_an_autoencoder_of_another_width_is_refused():
    with pytest.raises(CocomixError, match="reads vectors of 24 but the teacher's residual stream has 16"):
        ConceptTeacher(language_model(), autoencoder(width=24), 1, 4)


def test_heads_that_are_more_than_a_product_are_refused():
    biased = language_model()
    biased.lm_head = torch.nn.Linear(WIDTH, VOCABULARY, bias=True)
    granite = GraniteForCausalLM(GraniteConfig(**_SHARED, intermediate_size=24, logits_scaling=4.0))
    for model, kind in ((biased, "gpt2"), (granite, "granite")):
        with pytest.raises(CocomixError, match=f"a {kind} teacher is not supported: its head is more than one"):
            ConceptTeacher(model, autoencoder(), 1, 4)


@pytest.mark.parametrize("mixing", ["interleave", "add"])
def test_a_model_with_concepts_is_no_teacher(mixing):
    model = small_model(mixing=mixing)
    message = f"a CoCoMix model with mixing={mixing} cannot be a teacher"
    with pytest.raises(CocomixError, match=message):
        ConceptTeacher(model, autoencoder(), 0, 4)
    with pytest.raises(CocomixError, match=message):
        residual_stream(model, 0, windows(vocabulary=20))


def test_a_window_beyond_the_teachers_context_is_refused():
    teacher = ConceptTeacher(language_model(), autoencoder(), 1, 4)
    with pytest.raises(CocomixError, match="windows of 33 tokens, .* teacher .* 32"):
        teacher.labels(windows(length=33))


# --- loading


def test_a_teacher_is_loaded_as_its_config_says(tmp_path, monkeypatch):
    model, sae, ids = language_model(), autoencoder(), windows()
    model.save_pretrained(tmp_path / "model")
    sae.save(tmp_path / "sae")
    config = TeacherConfig(model=str(tmp_path / "model"), sae=str(tmp_path / "sae"), layer=2, label_topk=3)
    teacher = ConceptTeacher.from_config(config, torch.device("cpu"))
    assert torch.equal(teacher.labels(ids), ConceptTeacher(model, sae, 2, 3).labels(ids))
    config.dtype = "bf16"
    lower = ConceptTeacher.from_config(config, torch.device("cpu"))
    assert lower.model.dtype == lower.sae.W_enc.dtype == torch.bfloat16
    assert lower.labels(ids).shape == (3, 10, 3)
    assert lower.fingerprints()["dtype"] != teacher.fingerprints()["dtype"]
    for capabilities, dtype in (({"amx_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        config.dtype = "auto"
        assert ConceptTeacher.from_config(config, torch.device("cpu")).model.dtype == dtype


@pytest.mark.parametrize("missing", ["model", "sae"])
def test_an_unset_path_is_named(tmp_path, missing):
    config = TeacherConfig(**{"model": str(tmp_path), "sae": str(tmp_path), missing: None})
    with pytest.raises(CocomixError, match=f"need teacher.{missing}: set it to a path"):
        ConceptTeacher.from_config(config, torch.device("cpu"))


def test_a_missing_empty_or_damaged_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    language_model().save_pretrained(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:2000])
    for name in ("nowhere", "empty", "damaged"):
        with pytest.raises(CocomixError, match=f"cannot load a causal language model from {tmp_path / name}: "):
            load_language_model(tmp_path / name)


def test_a_loaded_model_is_frozen(tmp_path):
    language_model().save_pretrained(tmp_path)
    model = load_language_model(tmp_path)
    assert not model.training and model.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_fingerprints_tell_teachers_autoencoders_and_blocks_apart():
    torch.manual_seed(5)
    model, sae = language_model(), autoencoder()
    first = ConceptTeacher(model, sae, 1, 4).fingerprints()
    assert first == ConceptTeacher(model, sae, 1, 4).fingerprints()
    assert all(isinstance(value, str) for value in first.values())
    for other, key in [
        (ConceptTeacher(language_model(), sae, 1, 4), "teacher"),
        (ConceptTeacher(model, autoencoder(), 1, 4), "sae"),
        (ConceptTeacher(model, sae, 2, 4), "layer"),
        (ConceptTeacher(model, sae, 1, 3), "label_topk"),
    ]:
        assert [name for name, value in other.fingerprints().items() if value != first[name]] == [key]


def test_a_models_fingerprint_counts_every_weight():
    model = language_model()
    before = fingerprint(model)
    assert len(before) == len(hashlib.sha256().hexdigest())
    with torch.no_grad():
        model.transformer.h[3].mlp.c_proj.bias[-1] += 1
    assert fingerprint(model) != before
