"""`concept_head` against its reference: values, indices, loss, every gradient, memory and products."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    assert_all_close,
    assert_no_worse_than,
    cast,
    leaves,
    linear_layers,
    run,
    set_chunk_bytes,
    trace,
)

from cocomix_kernels import concept_head, reference

N, D, C, K = 13, 6, 300, 4
FROZEN = [f for size in (1, 2) for f in itertools.combinations(range(3), size)]


def layer(n=N, d=D, width=C, dtype=torch.float64):
    """x, weight, bias and labels, of which some are missing and some tokens have none."""
    labels = torch.randint(width, (n, K)).masked_fill(torch.rand(n, K) < 0.3, -1)
    labels[::5] = -1
    return [*(t.to(dtype) for t in (torch.randn(n, d), torch.randn(width, d), torch.randn(width))), labels]


def head(k):
    return lambda x, weight, bias, labels: concept_head(x, weight, bias, k, labels)


def true_head(k):
    return lambda x, weight, bias, labels: reference.concept_head(x, weight, bias, k, labels)


def some_cotangents(which, k, n=N):
    values, loss = torch.randn(n, k, dtype=torch.float64), torch.randn((), dtype=torch.float64)
    return [values if which != "loss" else None, None, loss if which != "values" else None]


@pytest.mark.parametrize("which", ["values", "loss", "both"])
@pytest.mark.parametrize("k", [1, 5, 70, C])
def test_outputs_and_gradients_equal_the_reference(k, which):
    inputs, grads = layer(), some_cotangents(which, k)
    actual, expected = run(head(k), inputs, grads), run(true_head(k), inputs, grads)
    assert_all_close(actual[0], expected[0])
    assert_all_close(actual[1], expected[1])


def test_without_labels_there_is_no_loss_and_the_gradient_is_that_of_the_values():
    *inputs, _ = layer()
    grads = some_cotangents("values", 5)
    actual, expected = run(head(5), [*inputs, None], grads), run(true_head(5), [*inputs, None], grads)
    assert actual[0][2] is None
    assert_all_close(actual[0], expected[0])
    assert_all_close(actual[1], expected[1])


@pytest.mark.parametrize("k", [1, 4, 30])
def test_gradients_through_both_outputs_pass_gradcheck(k):
    *inputs, labels = layer(6, 3, 30)

    def function(x, weight, bias):
        values, _, loss = concept_head(x, weight, bias, k, labels)
        return values, loss

    assert torch.autograd.gradcheck(function, leaves(inputs))


@given(linear_layers(), st.integers(0, 5), st.sampled_from((0.0, 0.3, 0.9, 1.0)), st.integers(0, 2**32))
@settings(max_examples=80)
def test_any_shape_with_ties_excluded_columns_and_labels(case, n_labels, missing, seed):
    *inputs, k = case
    generator = torch.Generator().manual_seed(seed)
    shape = len(inputs[0]), n_labels
    labels = torch.randint(len(inputs[1]), shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < missing] = -1
    grads = [torch.randint(-3, 4, (shape[0], k)).double(), None, torch.tensor(2.0)]
    expected = run(true_head(k), [*cast(inputs, torch.float64), labels], grads)
    actual = run(head(k), [*inputs, labels], grads)
    dtype = inputs[0].dtype
    accumulated, stored = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5)}.get(dtype, (1e-5, 2e-2))
    assert torch.equal(actual[0][1], expected[0][1])
    assert_all_close(actual[0], expected[0], accumulated, accumulated)
    assert_all_close(actual[1], expected[1], stored, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indices_are_a_stable_sort_of_the_same_logits(dtype):
    x, weight = (torch.randint(-8, 9, shape).to(dtype) for shape in ((40, 16), (5000, 16)))
    bias = torch.randint(-8, 9, (5000,)).to(dtype)
    logits = torch.addmm(bias, x, weight.t())
    values, indices, _ = concept_head(x, weight, bias, 32, torch.zeros(40, 1, dtype=torch.int64))
    expected, order = torch.sort(logits, dim=1, descending=True, stable=True)
    assert torch.equal(indices, order[:, :32])
    assert torch.equal(values, expected[:, :32].float())


@pytest.mark.parametrize("width", [64, 5000])
def test_bfloat16_is_as_exact_as_pytorch_and_accumulates_in_float32(width):
    inputs = layer(200, 64, width, torch.bfloat16)
    grads = some_cotangents("both", 8, 200)
    (values, indices, loss), ours = run(head(8), inputs, grads)
    assert values.dtype == loss.dtype == torch.float32
    assert [g.dtype for g in ours[:3]] == 3 * [torch.bfloat16]

    def same_selection(x, weight, bias, labels):
        logits = x @ weight.T + bias
        values, valid = logits.gather(1, indices), labels >= 0
        log_p = logits.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(1).gather(1, labels.clamp(min=0))
        per_token = -torch.where(valid, log_p, 0).sum(1) / valid.sum(1).clamp(min=1)
        return values, per_token.sum() / valid.any(1).sum()

    exact, exact_gradients = run(same_selection, cast(inputs, torch.float64), grads[::2])
    plain, plain_gradients = run(same_selection, inputs, grads[::2])
    assert_no_worse_than([*plain, *plain_gradients], [values, loss, *ours], [*exact, *exact_gradients])


def test_float32_sums_do_not_drift_over_many_chunks(monkeypatch):
    set_chunk_bytes(monkeypatch, 1)
    inputs, grads = layer(600, 8, 50, torch.bfloat16), some_cotangents("loss", 1, 600)
    _, chunked = run(head(1), inputs, grads)
    _, exact = run(true_head(1), cast(inputs, torch.float64), grads)
    assert_all_close(chunked[1:3], exact[1:3], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("labels", [None, torch.full((1000, 1), -1)], ids=["no labels", "only missing labels"])
def test_the_gradient_of_a_column_that_every_row_keeps_adds_up_in_float32(labels):
    inputs = [torch.ones(1000, 2), torch.ones(5, 2), torch.arange(5.0).flip(0), labels]
    grads = [torch.ones(1000, 1), None, None]
    _, (_, dw, db, _) = run(head(1), cast(inputs, torch.bfloat16), grads)
    assert dw[0].eq(1000).all() and db[0] == 1000  # in bfloat16 it would stop at 256


@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    inputs, grads = layer(), some_cotangents("both", 5)
    expected = run(true_head(5), inputs, grads, frozen)
    assert_all_close(run(head(5), inputs, grads, frozen)[1], expected[1])


def test_a_detached_call_gives_the_same_numbers():
    x, weight, bias, labels = leaves(layer())
    with torch.no_grad():
        detached = concept_head(x, weight, bias, 5, labels)
    attached = concept_head(x, weight, bias, 5, labels)
    assert not detached.loss.requires_grad and not detached.values.requires_grad
    assert attached.loss.requires_grad and not attached.indices.requires_grad
    assert_all_close(detached, [t.detach() for t in attached])


def test_a_second_backward_pass_gives_the_same_gradients():
    *inputs, labels = leaves(layer())
    values, _, loss = concept_head(*inputs, 5, labels)
    grads = torch.randn_like(values), torch.tensor(0.1, dtype=torch.float64)
    first = torch.autograd.grad((values, loss), inputs, grads, retain_graph=True)
    second = torch.autograd.grad((values, loss), inputs, grads)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 9000])  # one row, and a number that leaves a ragged last chunk
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_do_not_change_the_result(dtype, chunk_bytes, monkeypatch):
    inputs, grads = layer(dtype=dtype), some_cotangents("both", 5)
    whole = run(head(5), inputs, grads)
    set_chunk_bytes(monkeypatch, chunk_bytes)
    chunked = run(head(5), inputs, grads)
    tight = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert torch.equal(whole[0][1], chunked[0][1])
    assert_all_close(chunked[0], whole[0], tight, tight)
    assert_all_close(chunked[1], whole[1], tight, tight)


@pytest.mark.parametrize("shape", [(N, K), (N, 0), (0, K)])
def test_without_any_label_the_loss_and_its_gradient_are_zero(shape):
    inputs = [*layer(shape[0])[:3], torch.full(shape, -1)]
    (_, _, loss), gradients = run(head(5), inputs, some_cotangents("loss", 5, shape[0]))
    assert loss == 0
    assert not any(g.any() for g in gradients[:3])


def test_a_label_given_twice_counts_twice():
    x, weight, bias, _ = layer(3)
    once = concept_head(x, weight, bias, 1, torch.tensor([[7, 9, -1]] * 3)).loss
    twice = concept_head(x, weight, bias, 1, torch.tensor([[7, 7, 9]] * 3)).loss
    of_seven = concept_head(x, weight, bias, 1, torch.tensor([[7]] * 3)).loss
    torch.testing.assert_close(twice, (2 * once + of_seven) / 3)


def test_the_order_and_place_of_labels_does_not_matter():
    *inputs, labels = layer()
    loss = concept_head(*inputs, 1, labels).loss
    torch.testing.assert_close(concept_head(*inputs, 1, labels.flip(1)).loss, loss)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_may_have_any_integer_type_that_holds_them(dtype):
    *inputs, labels = layer(width=100)
    labels = labels.clamp(min=0) if dtype == torch.uint8 else labels
    assert torch.equal(concept_head(*inputs, 1, labels.to(dtype)).loss, concept_head(*inputs, 1, labels).loss)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("width", [7, 4097])
def test_a_nan_logit_is_first_and_reaches_the_loss_and_the_gradient(width, dtype):
    x, weight, bias, _ = layer(width=width, dtype=dtype)
    bias[5] = torch.nan
    (values, indices, loss), gradients = run(head(2), [x, weight, bias, torch.zeros(N, 1, dtype=torch.int64)])
    assert indices[:, 0].eq(5).all() and values[:, 0].isnan().all() and values[:, 1].isfinite().all()
    assert loss.isnan()
    assert all(g.isnan().any() for g in gradients[:3])


@pytest.mark.parametrize("finite", [0, 1, 3, 4])
def test_fewer_finite_logits_than_kept(finite):
    x, weight, bias, _ = layer(width=200)
    bias[finite:] = -torch.inf
    labels = torch.full((N, 1), max(finite - 1, 0))
    actual = concept_head(x, weight, bias, 4, labels)
    expected = reference.concept_head(x, weight, bias, 4, labels)
    assert_all_close(actual, expected)
    assert torch.equal(actual.indices[:, finite:], torch.arange(finite, 4).expand(N, -1))
    assert actual.loss.isfinite() == (finite > 0)


def test_large_logits_neither_overflow_nor_underflow():
    inputs = [t * 1e3 if t.is_floating_point() else t for t in layer(dtype=torch.float32)]
    grads = some_cotangents("loss", 5)
    (_, _, loss), gradients = run(head(5), inputs, grads)
    (_, _, exact), exact_gradients = run(true_head(5), cast(inputs, torch.float64), grads)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=0)
    assert_all_close(gradients[:3], exact_gradients[:3], rtol=1e-3, atol=1e-2)


def test_inputs_stay_as_they_were_under_anomaly_detection():
    *inputs, labels = layer()
    kept = [t.clone() for t in (*inputs, labels)]
    wanted = [t.requires_grad_() for t in inputs]
    with torch.autograd.set_detect_anomaly(True):
        values, _, loss = concept_head(*wanted, 5, labels)
        torch.autograd.grad(loss + values.sum(), wanted)
    assert all(map(torch.equal, (*inputs, labels), kept))


def test_a_gradient_of_the_gradient_is_refused_rather_than_wrong():
    *inputs, labels = leaves(layer())
    (gradient,) = torch.autograd.grad(concept_head(*inputs, 3, labels).loss, inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


def test_outputs_may_be_changed_in_place_before_the_backward_pass():
    inputs = leaves(layer())
    values, indices, loss = head(5)(*inputs)
    expected = torch.autograd.grad(2 * values.sum() + 3 * loss, inputs[:3], retain_graph=True)
    values *= 2
    loss *= 3
    assert_all_close(torch.autograd.grad(values.sum() + loss, inputs[:3]), expected)


def test_inputs_need_not_be_contiguous():
    x, weight, bias, labels = layer()
    strided = (x.t().contiguous().t(), weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0])
    grads = some_cotangents("both", 5)
    actual = run(head(5), [*strided, labels.t().contiguous().t()], grads)
    expected = run(head(5), [x, weight, bias, labels], grads)
    assert_all_close(actual[0] + actual[1], expected[0] + expected[1])


def training(n, width, k, dtype, frozen=()):
    x, weight, bias, labels = leaves(layer(n, 16, width, dtype), frozen)
    wanted = [t for t in (x, weight, bias) if t.requires_grad]

    def forward_and_backward():
        values, _, loss = concept_head(x, weight, bias, k, labels)
        return torch.autograd.grad((values, loss), wanted, (torch.ones_like(values), torch.ones_like(loss)))

    return forward_and_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [8, 100])
def test_memory_is_bounded_by_a_chunk_and_not_by_n_times_c(k, dtype, monkeypatch):
    chunk, width = 2**19, 8192
    set_chunk_bytes(monkeypatch, chunk)
    peaks = {}
    for n in (128, 512):
        _, peaks[n], largest = trace(training(n, width, k, dtype))
        assert largest < 2 * n * width  # bytes: not even bfloat16 logits would fit
    gradients = 3 * 4 * width * (16 + 1)  # of weight and bias: the loss's, the sum's, and one in the dtype
    assert peaks[128] - gradients < chunk
    assert peaks[512] - peaks[128] < 384 * 32 * (k + 16)  # outputs and x's gradient grow with N, and nothing else


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("frozen", "expected"), [((), 3), ((0,), 2), ((1, 2), 2), ((1,), 3)])
def test_training_makes_three_products_and_no_fourth(frozen, expected, dtype, monkeypatch):
    set_chunk_bytes(monkeypatch, 2**16)
    products, *_ = trace(training(64, 1000, 8, dtype, frozen))
    assert products["addmm"] + products["mm"] == expected * 64 * 1000 * 16
    assert products["bmm"] <= 64 * 8 * 16


def test_evaluation_makes_one_product():
    x, weight, bias, labels = layer(64, 16, 1000, torch.float32)
    with torch.no_grad():
        products, *_ = trace(lambda: concept_head(x, weight.requires_grad_(), bias, 8, labels))
    assert products == {"addmm": 64 * 1000 * 16}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(4)), r"x has shape \[4\], expected \[N, d\]"),
        (dict(weight=torch.randn(9, 2)), r"weight has shape \[9, 2\], expected \[C, d\] with .*d=3"),
        (dict(bias=torch.randn(8)), r"bias has shape \[8\], expected \[C\] with C=9"),
        (dict(labels=torch.zeros(5, 2).long()), r"labels has shape \[5, 2\], expected \[N, K\] with N=4"),
        (dict(labels=torch.zeros(4).long()), r"labels has shape \[4\], expected \[N, K\]"),
        (dict(bias=torch.randn(9).bfloat16()), "bias has dtype torch.bfloat16 but x has torch.float32"),
        (dict(x=torch.ones(4, 3).long()), "x has dtype torch.int64, expected a floating-point dtype"),
        (dict(labels=torch.zeros(4, 2)), "labels has dtype torch.float32, expected "),
        (dict(labels=torch.zeros(4, 2).to(torch.uint16)), "labels has dtype torch.uint16, expected "),
        (dict(weight=torch.randn(9, 3, device="meta")), "weight is on meta but x is on cpu"),
        (dict(labels=torch.zeros(4, 2, device="meta").long()), "labels is on meta but x is on cpu"),
        (dict(k=0), "k is 0, expected 1 to 9"),
        (dict(k=10), "k is 10, expected 1 to 9"),
        (dict(labels=torch.tensor([[0, 9]] * 4)), "labels holds values from 0 to 9, expected -1 to 8"),
        (dict(labels=torch.tensor([[-100, 1]] * 4)), "labels holds values from -100 to 1, expected -1 to 8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    fitting = dict(x=torch.randn(4, 3), weight=torch.randn(9, 3), bias=torch.randn(9), k=2)
    with pytest.raises(ValueError, match="concept_head: " + message):
        concept_head(**(fitting | dict(labels=torch.zeros(4, 2).long()) | change))


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_operators_meet_the_librarys_contract(labelled, backend):
    x, weight, bias, labels = layer(5, 3, 30, torch.float32)
    labels = labels if labelled else None
    arguments = (*leaves([x, weight, bias]), labels, 4, True, True, backend)
    torch.library.opcheck(torch.ops.cocomix.concept_head.default, arguments)
    values, indices, loss, *of_loss = torch.ops.cocomix.concept_head(x, weight, bias, labels, 4, True, True, backend)
    arguments = (values, loss if labelled else None, indices, x, weight, *of_loss, True, True, backend)
    torch.library.opcheck(torch.ops.cocomix.concept_head_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(dtype):
    def function(x, weight, bias, labels):
        return concept_head(x * 2, weight, bias, 4, labels)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        inputs, grads = layer(n, 3, 30, dtype), some_cotangents("both", 4, n)
        actual, expected = run(compiled, inputs, grads), run(function, inputs, grads)
        assert_all_close(actual[0], expected[0], 1e-6, 1e-6)
        assert_all_close(actual[1], expected[1], 1e-6, 1e-6)
