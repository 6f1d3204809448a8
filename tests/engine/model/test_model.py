import contextlib

import pytest
import torch
from kernel_helpers import set_chunk_bytes, trace
from model_helpers import METHODS, SMALL, batch, every_method, golden_model, gradients, naive_student, small_model
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from cocomix import CoCoMixConfig, CoCoMixForCausalLM
from cocomix.core.flops import cocomix_forward
from cocomix.core.methods import predicts_concepts
from cocomix.core.shapes import StudentShape
from cocomix_kernels import interleaved_attention

MIXED = [(method, layer) for method in METHODS if method["mixing"] != "none" for layer in range(SMALL["n_layer"])]


def within(actual, expected, tolerance=1e-4):
    assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


def losses_and_gradients(model, ids, concept_labels):
    model.zero_grad()
    out = model(ids, labels=ids, concept_labels=concept_labels)
    out.loss.backward()
    return out, gradients(model)


# --- the published implementation's numbers


def test_outputs_are_those_of_the_papers_implementation():
    model, expected = golden_model()
    ids, labels = expected["input_ids"], expected["concept_labels"]
    out = model(ids, labels=ids, concept_labels=labels, return_logits=True)
    within(out.logits, expected["logits"])
    within(out.ntp_loss, expected["loss"])
    within(out.concept_loss, expected["concept_loss"])
    within(out.loss, expected["total"])
    assert torch.equal(out.concept_indices.sort(-1).values, expected["topk"])
    within(out.concept_values, expected["concept_logits"].gather(-1, out.concept_indices))
    assert (out.concept_values.diff(dim=-1) <= 0).all()


def test_every_gradient_is_that_of_the_papers_implementation():
    model, expected = golden_model()
    _, actual = losses_and_gradients(model, expected["input_ids"], expected["concept_labels"])
    reference = {key.removeprefix("g."): value for key, value in expected.items() if key.startswith("g.")}
    reference["transformer.compress_layer.weight"] = reference["transformer.compress_layer.weight"].T
    assert set(actual) == set(reference)
    for name, gradient in actual.items():
        assert_close(gradient, reference[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_fifteen_training_steps_follow_the_papers_implementation():
    model, expected = golden_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    trajectory = []
    for step in range(len(expected["traj"])):
        generator = torch.Generator().manual_seed(1000 * 21 + step)
        ids = torch.randint(0, model.config.vocab_size, (3, 12), generator=generator)
        labels = torch.stack([torch.randperm(96, generator=generator)[:4] for _ in range(36)]).view(3, 12, 4)
        out, _ = losses_and_gradients(model, ids, labels)
        trajectory.append([out.ntp_loss.item(), out.concept_loss.item()])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    within(torch.tensor(trajectory), expected["traj"])


# --- the method, written naively


@pytest.mark.parametrize("method, insert_layer", [*MIXED, ({"mixing": "none"}, 0)])
def test_losses_logits_and_gradients_equal_the_naive_model(method, insert_layer):
    model = small_model(torch.float64, **method, insert_layer=insert_layer)
    ids, labels = batch(model.config)
    out = model(ids, labels=ids, concept_labels=labels, return_logits=True)
    out.loss.backward()
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    logits, ntp_loss, concept_loss = naive_student(parameters, model.config, ids, labels)
    loss = ntp_loss if concept_loss is None else ntp_loss + 0.1 * concept_loss
    loss.backward()
    assert_close(out.logits, logits)
    assert_close(out.ntp_loss, ntp_loss)
    assert_close(out.loss, loss)
    assert (out.concept_loss is None) == (not predicts_concepts(method["mixing"]))
    if concept_loss is not None:
        assert_close(out.concept_loss, concept_loss)
    for name, gradient in gradients(model).items():
        assert_close(gradient, parameters[name].grad, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("mixing", ["interleave", "add"])
def test_without_concept_labels_the_loss_is_next_token_prediction_through_the_concepts(mixing):
    model = small_model(torch.float64, mixing=mixing)
    ids, _ = batch(model.config)
    out, actual = losses_and_gradients(model, ids, None)
    assert out.concept_loss is None
    assert_close(out.loss, out.ntp_loss, rtol=0, atol=0)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    naive_student(parameters, model.config, ids)[1].backward()
    for name, gradient in actual.items():
        assert_close(gradient, parameters[name].grad, msg=lambda m, n=name: f"{n}: {m}")
    assert actual["transformer.concept_predictor.weight"].abs().sum() > 0


def test_labels_that_are_all_missing_add_nothing():
    model = small_model(torch.float64)
    ids, labels = batch(model.config)
    without, expected = losses_and_gradients(model, ids, None)
    out, actual = losses_and_gradients(model, ids, torch.full_like(labels, -1))
    assert out.concept_loss == 0
    assert_close(out.loss, without.loss, rtol=0, atol=0)
    assert_close(actual, expected)


@every_method
def test_a_window_of_one_token_predicts_nothing_and_still_trains(method):
    model = small_model(**method)
    ids, labels = batch(model.config, length=1)
    labels[0, 0, 0] = 5
    out, found = losses_and_gradients(model, ids, labels)
    assert out.ntp_loss == 0
    assert model(ids).logits.shape == (2, 1, SMALL["vocab_size"])
    if predicts_concepts(method["mixing"]):
        assert (out.concept_loss > 0) == (method.get("concept_every", 1) == 1)  # else no token here has a concept
        assert_close(out.loss, 0.1 * out.concept_loss)
    assert all(torch.isfinite(gradient).all() for gradient in found.values())


@pytest.mark.parametrize("method, insert_layer", [*MIXED, ({"mixing": "none"}, 0)])
def test_rows_of_a_batch_do_not_see_each_other(method, insert_layer):
    model = small_model(torch.float64, **method, insert_layer=insert_layer)
    ids, _ = batch(model.config, n_rows=3)
    other = ids.clone()
    other[1] = (other[1] + 1) % SMALL["vocab_size"]
    before, after = model(ids).logits, model(other).logits
    assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-12)
    assert not torch.allclose(after[1], before[1])


@pytest.mark.parametrize("method, insert_layer", [*MIXED, ({"mixing": "none"}, 0)])
def test_a_token_changes_no_logits_before_it(method, insert_layer):
    model = small_model(torch.float64, **method, insert_layer=insert_layer)
    ids, _ = batch(model.config)
    before = model(ids).logits
    for t in range(ids.shape[1]):
        other = ids.clone()
        other[:, t] = (other[:, t] + 1) % SMALL["vocab_size"]
        after = model(other).logits
        assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert ((after - before)[:, t:].abs().amax(-1) > 1e-6).all()


def test_micro_batches_add_up_to_one_batch():
    model = small_model(torch.float64)
    ids, labels = batch(model.config, n_rows=6)
    labels[2:4] = -1  # one micro batch without any label
    whole, expected = losses_and_gradients(model, ids, labels)
    count = (labels >= 0).any(-1).sum()
    model.zero_grad()
    parts = []
    for rows in (slice(0, 2), slice(2, 4), slice(4, 6)):
        out = model(ids[rows], labels=ids[rows], concept_labels=labels[rows], concept_token_count=count)
        (out.ntp_loss / 3 + 0.1 * out.concept_loss).backward()
        parts.append(out.concept_loss.detach())
    assert_close(sum(parts), whole.concept_loss.detach())
    assert_close(gradients(model), expected)


def test_ignored_labels_count_in_no_loss():
    model = small_model(torch.float64)
    ids, _ = batch(model.config)
    labels = ids.clone()
    labels[:, 4:] = -100
    out = model(ids, labels=labels, return_logits=True)
    expected = torch.nn.functional.cross_entropy(out.logits[:, :3].flatten(0, 1), ids[:, 1:4].flatten())
    assert_close(out.ntp_loss, expected)


def test_logits_come_where_they_are_asked_for():
    model = small_model()
    ids, _ = batch(model.config)
    full = model(ids).logits
    assert model(ids, labels=ids).logits is None
    assert_close(model(ids, labels=ids, return_logits=True).logits, full)
    assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])


# --- cost


@pytest.mark.parametrize("insert_layer", [0, 2, 3])
def test_the_arithmetic_is_the_ideal_and_the_last_block_computes_concept_positions_only(insert_layer):
    settings = dict(n_embd=64, n_layer=4, vocab_size=257, concept_dim=96, concept_topk=4, insert_layer=insert_layer)
    model = small_model(**settings, n_head=2, n_positions=32)
    ids, labels = batch(model.config, n_rows=4, length=32)
    # Products with weights; attention runs in a library's kernel, whose share vanishes at zero length.
    shape = StudentShape(**settings | {"concept_topk": 0}, seq_len=0)

    def forward():
        with torch.no_grad():
            return model(ids).logits

    def train():
        model(ids, labels=ids, concept_labels=labels).loss.backward()

    assert sum(trace(forward)[0].values()) == pytest.approx(ids.numel() * cocomix_forward(shape), rel=0.01)
    assert sum(trace(train)[0].values()) == pytest.approx(3 * ids.numel() * cocomix_forward(shape), rel=0.02)


def test_training_holds_neither_vocabulary_nor_concept_logits(monkeypatch):
    set_chunk_bytes(monkeypatch, 2**18)
    model = small_model(vocab_size=2048, concept_dim=2048, n_positions=256)
    ids, labels = batch(model.config, n_rows=4, length=256)

    def train():
        model(ids, labels=ids, concept_labels=labels).loss.backward()

    _, _, largest = trace(train)
    logits_bytes = ids.numel() * 2048 * 4
    assert largest < logits_bytes / 4


# --- precision and compilation


@every_method
def test_bfloat16_is_close_to_float32(method):
    model = CoCoMixForCausalLM(CoCoMixConfig(**SMALL, **method))
    ids, labels = batch(model.config)
    exact, expected = losses_and_gradients(model, ids, labels)
    out, actual = losses_and_gradients(model.to(torch.bfloat16), ids, labels)
    assert out.loss.dtype == torch.float32
    assert_close(out.loss, exact.loss, rtol=0.01, atol=0)
    flat = [torch.cat([g.float().flatten() for g in found.values()]) for found in (actual, expected)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.99
    assert all(gradient.dtype == torch.bfloat16 for gradient in actual.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@every_method
def test_a_compiled_model_is_one_graph_and_computes_the_same(method, backend, checkpointing, monkeypatch):
    model = small_model(**method)
    ids, labels = batch(model.config)
    eager, expected = losses_and_gradients(model, ids, labels)
    torch.compiler.reset()
    monkeypatch.setenv("COCOMIX_BACKEND", backend)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    model.zero_grad()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(ids, labels=ids, concept_labels=labels)
    out.loss.backward()
    assert_close(out.loss, eager.loss)
    assert_close(gradients(model), expected)


@every_method
def test_checkpointed_blocks_are_computed_twice_and_give_the_same_gradients(method):
    model = small_model(**method).train()
    ids, labels = batch(model.config)
    calls = []
    for block in model.transformer.h:
        block.attn.register_forward_hook(lambda *_: calls.append(1))
    _, expected = losses_and_gradients(model, ids, labels)
    model.gradient_checkpointing_enable()
    _, actual = losses_and_gradients(model, ids, labels)
    assert_close(actual, expected, rtol=0, atol=0)
    assert len(calls) == 3 * model.config.n_layer  # once without, twice with


def test_a_chosen_attention_backend_runs_all_queries_and_leaves_concept_queries_to_the_rule(monkeypatch):
    model, chosen = small_model(), []

    def attention(q, k, v, backend=None):
        chosen.append((q.shape[1] == k.shape[1], backend))
        return interleaved_attention(q, k, v)

    monkeypatch.setattr("cocomix.model.blocks.interleaved_attention", attention)
    model.transformer.set_attention_backend("flash")
    model(batch(model.config)[0])
    assert chosen == [(True, "flash"), (False, None)]


# --- initialisation, saving, loading


def test_a_new_model_starts_as_gpt2_does():
    model = CoCoMixForCausalLM(CoCoMixConfig(**{**SMALL, "n_embd": 64, "concept_dim": 400}))
    scaled = 0.02 / (2 * SMALL["n_layer"]) ** 0.5
    for name, parameter in model.named_parameters():
        if ".ln_" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:
            expected = scaled if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.1), name


@pytest.mark.parametrize(
    ("mixing", "has"),
    [
        ("predict", {"pre_bias", "concept_predictor.weight", "concept_predictor.bias"}),
        ("pause", {"pause_tokens.weight"}),
    ],
)
def test_other_methods_have_no_more_than_they_need(mixing, has):
    names = {name for name, _ in small_model(mixing=mixing).named_parameters()}
    assert names - {name for name, _ in small_model(mixing="none").named_parameters()} == {
        f"transformer.{name}" for name in has
    }


def test_concepts_that_are_predicted_alone_change_no_logits():
    model = small_model(mixing="predict")
    plain = small_model(mixing="none")
    plain.load_state_dict(model.state_dict(), strict=False)
    ids, _ = batch(model.config)
    out = model(ids)
    assert torch.equal(out.logits, plain(ids).logits)
    assert out.concept_indices.shape == (*ids.shape, SMALL["concept_topk"])


@pytest.mark.parametrize("mixing", ["interleave", "pause"])
def test_a_residual_without_a_concept_and_with_one_doubled_block_is_next_token_prediction(mixing):
    """Keys and values then come in equal pairs, and a softmax over pairs weighs them as it weighs single ones."""
    model = small_model(torch.float64, mixing=mixing, concept_residual=True, insert_layer=SMALL["n_layer"] - 1)
    plain = small_model(torch.float64, mixing="none")
    plain.load_state_dict(model.state_dict(), strict=False)
    for name in ("compress_layer.weight", "compress_layer.bias", "pre_bias", "pause_tokens.weight"):
        with contextlib.suppress(AttributeError), torch.no_grad():
            model.transformer.get_parameter(name).zero_()
    ids, _ = batch(model.config)
    assert_close(model(ids).logits, plain(ids).logits, rtol=1e-10, atol=1e-10)
    assert_close(model(ids, labels=ids).ntp_loss, plain(ids, labels=ids).ntp_loss, rtol=1e-6, atol=1e-6)


@every_method
def test_a_saved_model_comes_back_through_transformers_with_identical_logits(tmp_path, method):
    model = small_model(**method)
    ids, _ = batch(model.config)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is CoCoMixForCausalLM
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert (tmp_path / "model.safetensors").is_file()


def test_the_plain_model_has_no_concept_weights():
    names = {name for name, _ in small_model(mixing="none").named_parameters()}
    assert not [name for name in names if "concept" in name or "compress" in name or "pre_bias" in name]


def test_a_saved_config_keeps_every_setting(tmp_path):
    config = CoCoMixConfig(
        n_embd=24,
        n_layer=5,
        n_head=3,
        vocab_size=100,
        n_positions=33,
        concept_dim=70,
        concept_topk=7,
        insert_layer=4,
        concept_loss_weight=0.25,
        mixing="add",
        layer_norm_epsilon=1e-6,
        initializer_range=0.03,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    for loaded in (CoCoMixConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is CoCoMixConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
        assert (loaded.hidden_size, loaded.num_hidden_layers, loaded.max_position_embeddings) == (24, 5, 33)


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"mixing": "add", "concept_residual": True},
            "concept_residual needs concept positions, which mixing=add",
        ),
        (
            {"mixing": "predict", "concept_every": 2},
            "concept_every needs concept positions, which mixing=predict",
        ),
        ({"concept_every": 0}, "concept_every must be positive, not 0"),
        ({"mixing": "both"}, "mixing is 'both'; it must be one of interleave, add, predict, pause, none"),
        ({"n_embd": 30, "n_head": 4}, r"n_embd \(30\) must be a multiple of n_head \(4\)"),
        ({"insert_layer": 3}, r"insert_layer \(3\) must be >= 0 and below n_layer \(3\)"),
        ({"insert_layer": -1}, r"insert_layer \(-1\)"),
        ({"concept_topk": 41}, r"concept_topk \(41\) must be positive and at most concept_dim \(40\)"),
        ({"concept_topk": 0}, r"concept_topk \(0\)"),
        ({"n_head": 0}, "n_head must be positive, not 0"),
        ({"n_layer": 0}, "n_layer must be positive, not 0"),
        ({"n_embd": -16}, "n_embd must be positive, not -16"),
        ({"vocab_size": 0}, "vocab_size must be positive, not 0"),
        ({"n_positions": 0}, "n_positions must be positive, not 0"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CoCoMixConfig(**{**SMALL, **settings})


def test_the_plain_model_does_not_mind_concept_settings():
    CoCoMixConfig(**{**SMALL, "mixing": "none", "insert_layer": 99, "concept_topk": 99})


@pytest.mark.parametrize("mixing", ["interleave", "pause"])
@pytest.mark.parametrize("residual", [False, True])
def test_a_concept_after_every_token_is_the_method_as_it_was_bit_for_bit(mixing, residual, monkeypatch):
    """By the general layout, one token a concept, against the pairs that the kernels know."""
    model = small_model(torch.float64, mixing=mixing, concept_residual=residual)
    ids, labels = batch(model.config)
    expected, gradients_of = losses_and_gradients(model, ids, labels)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.transformer), "_mix", lambda self, x, labels, _: mixed_by_layout(self, x, labels))
        found, same = losses_and_gradients(model, ids, labels)
    assert torch.equal(found.loss, expected.loss)
    assert all(torch.equal(same[name], gradient) for name, gradient in gradients_of.items())


def mixed_by_layout(transformer, hidden, labels):
    pairs, concepts = transformer._with_concepts(hidden, labels)
    return transformer.config.layout.interleave(pairs[:, 0::2], pairs[:, 1::2]), concepts


def test_with_a_zero_compress_layer_and_one_block_the_residual_form_is_next_token_prediction():
    """With a concept at every token, or none in the window: else keys come in equal pairs at some tokens alone."""
    plain = small_model(torch.float64, mixing="none")
    for every in (1, 12):
        model = small_model(
            torch.float64, mixing="interleave", concept_residual=True, insert_layer=2, concept_every=every
        )
        model.load_state_dict(plain.state_dict(), strict=False)
        with torch.no_grad():
            for parameter in (*model.transformer.compress_layer.parameters(), model.transformer.pre_bias):
                parameter.zero_()
        ids, _ = batch(model.config, length=11)
        assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-10)
