"""Steering against dense logits, and against a model whose predictor was changed by hand."""

import copy
import math

import pytest
import torch
from model_helpers import SMALL, autoencoder, batch, greedy, left_padded, method_settings, small_model
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

import cocomix
from cocomix.core.errors import CocomixError
from cocomix.inference.steering import SteeredHead, add_steps, parse_operation, steer_teacher
from cocomix.teacher.concept_teacher import ConceptTeacher
from cocomix.teacher.language_model import residual_stream
from cocomix_kernels import concept_head

K, C = SMALL["concept_topk"], SMALL["concept_dim"]
CONCEPTS = {3: 3.0, 7: "set:0", 11: "x-2", 20: "set:40"}


def dense_head(x, weight, bias, k, concepts):
    """TopK over all C logits after the changes: values descending, ties to the lowest index."""
    z = x @ weight.T + bias
    forced = []
    for concept, text in concepts.items():
        kind, _, strength = str(text).partition(":")
        if kind == "force":
            forced.append(concept)
        if kind in ("set", "force") and strength:
            z[:, concept] = float(strength)
        elif kind not in ("set", "force"):
            z[:, concept] *= float(str(text).removeprefix("x"))
    rank = z.clone()
    rank[:, forced] = math.inf
    kept = rank.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(1).values
    values, order = z.gather(1, kept).sort(dim=1, descending=True, stable=True)
    return values, kept.gather(1, order)


@pytest.mark.parametrize(
    "concepts",
    [
        CONCEPTS,
        {0: "force"},
        {5: "force:-100", 6: "force:0.5", 39: "force"},
        {5: -1.0, 6: "force:100", 7: "set:-3", 8: 0},
        {j: "force:1" for j in range(K)},  # no room for any other, and ties
        {j: "set:9" for j in range(K + 3)},  # ties: the lowest ids win
        {j: 0.5 for j in range(C)},  # every concept there is
        {j: "set:2" for j in range(C)},
    ],
    ids=str,
)
def test_steered_topk_is_that_of_the_changed_dense_logits(concepts):
    x, weight, bias = torch.randn(50, 16).double(), torch.randn(C, 16).double(), torch.randn(C).double()
    head = SteeredHead(add_steps({}, concepts, C))(x, weight, bias, K)
    values, indices = dense_head(x, weight, bias, K, concepts)
    assert torch.equal(head.indices, indices)
    assert_close(head.values, values, rtol=1e-12, atol=1e-12)


def test_steered_topk_breaks_ties_as_dense_logits_do():
    x, weight = torch.randint(-1, 2, (80, 4)).double(), torch.randint(-1, 2, (C, 4)).double()
    for concepts in ({3: 2.0, 17: "set:1"}, {30: "force", 31: "force:1"}, {0: "set:2", 39: "set:2", 5: "x0"}):
        head = SteeredHead(add_steps({}, concepts, C))(x, weight, torch.zeros(C).double(), K)
        for actual, expected in zip(head, dense_head(x, weight, 0.0, K, concepts), strict=False):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steering_by_one_changes_no_bit(dtype):
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((30, 777), (999, 777), (999,)))
    own = concept_head(x, weight, bias, K)
    first = own.indices[0].tolist()
    for concepts in (first[:2], first, range(0, 999, 3)):  # few products are summed in another order than many
        head = SteeredHead(add_steps({}, dict.fromkeys(concepts, 1.0), 999))(x, weight, bias, K)
        assert torch.equal(head.values, own.values) and torch.equal(head.indices, own.indices)


# --- in the model


def changed_by_hand(model):
    """A copy of a model with the predictor's rows of CONCEPTS multiplied, or replaced by a bias."""
    model = copy.deepcopy(model)
    predictor = model.transformer.concept_predictor
    with torch.no_grad():
        for concept, factor in ((3, 3.0), (7, 0.0), (11, -2.0), (20, 0.0)):
            predictor.weight[concept] *= factor
            predictor.bias[concept] *= factor
        predictor.bias[20] = 40
    return model


@pytest.mark.parametrize(
    "mixing, insert_layer", [("interleave", 0), ("interleave", 2), ("add", 1), ("interleave residual", 1)]
)
def test_a_steered_model_is_one_whose_predictor_was_changed(mixing, insert_layer):
    model = small_model(torch.float64, **method_settings(mixing), insert_layer=insert_layer)
    expected = changed_by_hand(model)
    ids, labels = batch(model.config)
    plain = model(ids, labels=ids, concept_labels=labels, return_logits=True)
    with cocomix.steer(model, CONCEPTS):
        out = model(ids, labels=ids, concept_labels=labels, return_logits=True)
    reference = expected(ids)
    assert_close(out.logits, reference.logits)
    assert torch.equal(out.concept_indices, reference.concept_indices)
    assert (out.concept_indices[..., 0] == 20).all() and (out.concept_values[..., 0] == 40).all()
    assert not torch.allclose(plain.logits, out.logits)
    assert_close(out.concept_loss, plain.concept_loss)  # of the model's own prediction
    assert torch.equal(model(ids).logits, plain.logits)


def test_a_steered_model_generates_the_same_with_and_without_a_cache_in_padded_batches_and_beams():
    model = small_model()
    expected = changed_by_hand(model)
    full, _ = batch(model.config, n_rows=3, length=5)
    prompts = [full[0, :2], full[1], full[2, :4]]
    ids, mask = left_padded(prompts, 5)
    plain = greedy(model, ids, 6, attention_mask=mask)
    for options in ({}, {"num_beams": 3}):
        with cocomix.steer(model, CONCEPTS):
            cached, uncached = (
                greedy(model, ids, 6, attention_mask=mask, use_cache=use, **options) for use in (True, False)
            )
            alone = [greedy(model, prompt[None], 6, **options)[0, len(prompt) :] for prompt in prompts]
        assert torch.equal(cached, uncached)
        assert torch.equal(cached, greedy(expected, ids, 6, attention_mask=mask, **options))
        for row in range(3):
            assert torch.equal(cached[row, 5:], alone[row])
    assert not torch.equal(cached, plain)
    assert torch.equal(greedy(model, ids, 6, attention_mask=mask), plain)


def test_a_forced_concept_is_kept_with_its_own_logit_and_the_lowest_other_leaves():
    model = small_model(torch.float64)
    ids, _ = batch(model.config)
    plain = model(ids)
    absent = next(j for j in range(C) if not (plain.concept_indices == j).any())
    with cocomix.steer(model, {absent: "force"}):
        out = model(ids)
    assert (out.concept_indices == absent).any(-1).all()
    assert (out.concept_values.diff(dim=-1) <= 0).all()
    for before, after in zip(plain.concept_indices.flatten(0, 1), out.concept_indices.flatten(0, 1), strict=True):
        assert set(before.tolist()) - set(after.tolist()) == {before[-1].item()}
    assert not torch.allclose(out.logits, plain.logits)


def test_blocks_nest_outer_first_and_leave_the_model_as_it_was_also_after_an_exception():
    model = small_model(torch.float64)
    predictor, (ids, _) = model.transformer.concept_predictor, batch(model.config)
    before, plain = dict(vars(predictor)), model(ids).logits

    def logits(concepts):
        with cocomix.steer(model, concepts):
            return model(ids).logits

    with pytest.raises(RuntimeError, match="on purpose"), cocomix.steer(model, {3: "set:4"}):
        outer = model(ids).logits
        with cocomix.steer(model, {3: 2.0, 9: "set:5"}):
            assert_close(model(ids).logits, logits({}))
            inner = model(ids).logits
        assert torch.equal(model(ids).logits, outer)
        with pytest.raises(CocomixError), cocomix.steer(model, {C: 1.0}):
            raise AssertionError("not reached")
        assert torch.equal(model(ids).logits, outer)
        raise RuntimeError("on purpose")
    assert torch.equal(model(ids).logits, plain)
    assert vars(predictor).keys() - {"steering"} == before.keys() - {"steering"} and predictor.steering is None
    assert_close(inner, logits({3: "set:8", 9: "set:5"}))
    assert not torch.allclose(inner, outer)
    assert torch.equal(logits({}), plain)


def test_gradients_pass_through_steered_concepts():
    model = small_model(torch.float64)
    ids, _ = batch(model.config)
    with cocomix.steer(model, {3: "force", 7: "set:2"}):
        model(ids, labels=ids).loss.backward()
    gradient = model.transformer.concept_predictor.weight.grad
    assert gradient[3].abs().sum() > 0 and gradient[7].abs().sum() == 0


# --- bad input


@pytest.mark.parametrize(
    "concepts, message",
    [
        ({C: 1.0}, f"no concept {C}: this model has the concepts 0 to {C - 1}"),
        ({-1: 1.0}, "no concept -1"),
        ({"quotes": 1.0}, "'quotes' is not a concept"),
        ({3: "strong"}, "'strong' is not a steering strength"),
        ({3: "set:"}, "'' is not a steering strength"),
        ({3: "double:2"}, "'double:2' is not a steering strength"),
        ({3: math.nan}, "nan is not a steering strength"),
        ({3: "xinf"}, "'inf' is not a steering strength"),
        ({3: None}, "None is not a steering strength"),
        ({j: "force" for j in range(K + 1)}, f"{K + 1} concepts are forced, but the model keeps {K}"),
    ],
)
def test_what_cannot_be_steered_is_refused_and_leaves_the_model_alone(concepts, message):
    model = small_model()
    with pytest.raises(CocomixError, match=message), cocomix.steer(model, concepts):
        raise AssertionError("not reached")
    assert model.transformer.concept_predictor.steering is None


def test_models_that_mix_no_concepts_in_and_models_in_training_are_refused():
    for model, kind in (
        *(
            (small_model(mixing=mixing), f"cocomix model with mixing={mixing}")
            for mixing in ("none", "predict", "pause")
        ),
        (GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=1)), "gpt2 model without"),
    ):
        with pytest.raises(CocomixError, match=f"mixes no concepts in .a {kind}"), cocomix.steer(model, {1: 2.0}):
            pass
    model = small_model().train()
    with pytest.raises(CocomixError, match=r"call model.eval\(\) first"), cocomix.steer(model, {1: 2.0}):
        pass
    model.eval()
    with pytest.raises(ValueError, match="never steered while it trains"), cocomix.steer(model, {1: 2.0}):
        model.train()(batch(model.config)[0])


@pytest.mark.parametrize(
    "text, expected",
    [
        ("3.0", "x3"),
        ("x-2", "x-2"),
        (3, "x3"),
        ("set:0", "set:0"),
        ("force", "force"),
        ("force:2.5", "force:2.5"),
        ("1e-3", "x0.001"),
    ],
)
def test_an_operation_is_written_as_it_is_read(text, expected):
    assert str(parse_operation(text)) == expected
    assert parse_operation(str(parse_operation(text))) == parse_operation(text)


# --- the teacher's SAE


@pytest.fixture
def teacher():
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=29, n_positions=12, n_embd=16, n_layer=3, n_head=2, initializer_range=0.2)
    ).double()
    return ConceptTeacher(model, autoencoder().double(), layer=1, label_topk=3)


def block_output(teacher, ids):
    """The residual stream that the blocks after the SAE read."""
    seen = []
    handle = teacher.model.transformer.h[2].register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    teacher.model(ids)
    handle.remove()
    return seen[0]


def test_the_teachers_residual_stream_changes_by_the_latents_change_times_its_direction(teacher):
    ids, _ = batch(small_model().config)
    x = residual_stream(teacher.model, 1, ids)
    x_hat, _, std = teacher.sae.normalize(x)
    values, indices = teacher.sae.encode(x)
    active = torch.zeros(*ids.shape, teacher.sae.n_latents).double().scatter(-1, indices, values)
    often, absent = indices.flatten().mode().values.item(), (active[0, 0] == 0).nonzero()[0].item()
    encoded = (x_hat - teacher.sae.pre_bias) @ teacher.sae.W_enc[absent] + teacher.sae.latent_bias[absent]
    expected_of = {
        "3": (often, 2 * active[..., often]),
        "set:5": (absent, 5 - active[..., absent]),
        "force": (absent, torch.where(active[..., absent] > 0, 0, encoded.relu())),
    }
    for text, (latent, change) in expected_of.items():
        with steer_teacher(teacher, {latent: text}):
            steered = block_output(teacher, ids)
            logits = teacher.model(ids).logits
        assert_close(steered, x + change[..., None] * teacher.sae.decoder[latent] * std)
        assert change.abs().sum() > 0 and not torch.allclose(logits, teacher.model(ids).logits)
    assert torch.equal(block_output(teacher, ids), x)


def test_a_steered_teacher_generates_the_same_with_and_without_a_cache(teacher):
    ids, _ = batch(small_model().config, length=4)
    plain = greedy(teacher.model, ids, 6)
    with steer_teacher(teacher, {5: "set:20", 6: "set:0"}):
        cached, uncached = (greedy(teacher.model, ids, 6, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, uncached) and not torch.equal(cached, plain)
    assert torch.equal(greedy(teacher.model, ids, 6), plain)
    with pytest.raises(CocomixError, match="no concept 64"), steer_teacher(teacher, {64: 1.0}):
        pass
