"""`topk_linear` against its reference: values, indices, every gradient, memory and products."""

import pytest
import torch
from hypothesis import given, settings
from kernel_helpers import (
    assert_all_close,
    assert_no_worse_than,
    cast,
    cotangents,
    leaves,
    linear_layers,
    relative_error,
    run,
    set_chunk_bytes,
    trace,
)

from cocomix_kernels import reference, topk_linear


def layer(n=13, d=6, width=300, dtype=torch.float64):
    return [t.to(dtype) for t in (torch.randn(n, d), torch.randn(width, d), torch.randn(width))]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("k", [1, 5, 70, 300])
def test_outputs_and_gradients_equal_the_reference(k, relu):
    inputs = [*layer(), k]
    grads = [torch.randn(13, k, dtype=torch.float64), None]
    expected = run(lambda *a: reference.topk_linear(*a, relu=relu), inputs, grads)
    actual = run(lambda *a: topk_linear(*a, relu=relu), inputs, grads)
    assert_all_close(actual[0], expected[0])
    assert_all_close(actual[1], expected[1])


def test_gradients_pass_gradcheck():
    assert torch.autograd.gradcheck(lambda x, w, b: topk_linear(x, w, b, 4)[0], leaves(layer(5, 3, 30)))


@given(linear_layers())
@settings(max_examples=60)
def test_any_shape_with_ties_and_excluded_columns(case):
    *inputs, k = case
    grads = [torch.randint(-3, 4, (len(inputs[0]), k)).double(), None]
    expected = run(reference.topk_linear, [*cast(inputs, torch.float64), k], grads)
    actual = run(topk_linear, [*inputs, k], grads)
    assert torch.equal(actual[0][1], expected[0][1])
    assert_all_close(actual[0], expected[0])
    rounding = 0 if inputs[0].dtype == torch.float64 else 2**-7 if inputs[0].dtype == torch.bfloat16 else 1e-6
    assert_all_close(actual[1], expected[1], rtol=rounding, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_indices_are_a_stable_sort_of_the_same_logits(dtype):
    x, weight = (torch.randint(-8, 9, shape).to(dtype) for shape in ((40, 16), (5000, 16)))
    bias = torch.zeros(5000, dtype=dtype)
    logits = torch.addmm(bias, x, weight.t())  # integers, so that any order of summation gives these
    values, indices = topk_linear(x, weight, bias, 32)
    expected, order = torch.sort(logits, dim=1, descending=True, stable=True)
    assert torch.equal(indices, order[:, :32])
    assert torch.equal(values, expected[:, :32].float())


def test_bfloat16_is_as_exact_as_pytorch_and_keeps_values_in_float32():
    inputs = [*layer(200, 64, 1000, torch.bfloat16), 8]
    grads = [torch.randn(200, 8), None]
    (values, indices), ours = run(topk_linear, inputs, grads)
    assert values.dtype == torch.float32
    assert [g.dtype for g in ours[:3]] == 3 * [torch.bfloat16]

    def same_selection(x, weight, bias, _):
        return ((x @ weight.T + bias).gather(1, indices),)

    exact, exact_gradients = run(same_selection, cast(inputs, torch.float64), grads[:1])
    plain, plain_gradients = run(same_selection, inputs, grads[:1])
    assert_no_worse_than([*plain, *plain_gradients], [values, *ours], [*exact, *exact_gradients])


def test_the_gradient_of_a_column_that_every_row_keeps_adds_up_in_float32():
    inputs = [torch.ones(1000, 2), torch.ones(5, 2), torch.arange(5.0).flip(0), 1]
    _, (_, dw, db, _) = run(topk_linear, cast(inputs, torch.bfloat16), [torch.ones(1000, 1), None])
    assert dw[0].eq(1000).all() and db[0] == 1000  # in bfloat16 it would stop at 256


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    inputs = [*layer(), 5]
    grads = [torch.randn(13, 5, dtype=torch.float64), None]
    expected = run(reference.topk_linear, inputs, grads, frozen)
    assert_all_close(run(topk_linear, inputs, grads, frozen)[1], expected[1])


def test_indices_and_a_detached_call_want_no_gradient():
    x, weight, bias = leaves(layer())
    assert not topk_linear(x, weight, bias, 3)[1].requires_grad
    with torch.no_grad():
        assert not topk_linear(x, weight, bias, 3)[0].requires_grad


def test_a_second_backward_pass_gives_the_same_gradients():
    inputs = leaves(layer())
    values, _ = topk_linear(*inputs, 5)
    grad = torch.randn_like(values)
    first = torch.autograd.grad(values, inputs, grad, retain_graph=True)
    second = torch.autograd.grad(values, inputs, grad)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("chunk_bytes", [1, 2000, 9000])  # one row, and a number that leaves a ragged last chunk
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_chunks_do_not_change_the_result(dtype, chunk_bytes, monkeypatch):
    inputs = [*layer(dtype=dtype), 5]
    grads = [torch.randn(13, 5, dtype=torch.float64), None]
    whole = run(topk_linear, inputs, grads)
    set_chunk_bytes(monkeypatch, chunk_bytes)
    chunked = run(topk_linear, inputs, grads)
    tight = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    assert torch.equal(whole[0][1], chunked[0][1])
    assert_all_close(chunked[0], whole[0], tight, tight)
    assert_all_close(chunked[1], whole[1], tight, tight)


def test_inputs_stay_as_they_were_under_anomaly_detection():
    inputs = layer()
    kept = [t.clone() for t in inputs]
    wanted = [t.requires_grad_() for t in inputs]
    with torch.autograd.set_detect_anomaly(True):
        values, _ = topk_linear(*wanted, 5, relu=True)
        torch.autograd.grad(values, wanted, cotangents([values]))
    assert all(map(torch.equal, inputs, kept))


def test_inputs_need_not_be_contiguous():
    x, weight, bias = layer()
    strided = x.t().contiguous().t(), weight.t().contiguous().t(), torch.stack([bias, bias], 1)[:, 0]
    assert_all_close(topk_linear(*strided, 5), topk_linear(x, weight, bias, 5))


def train(n, width, k, dtype):
    x, weight, bias = leaves(layer(n, 16, width, dtype))

    def forward_and_backward():
        values, _ = topk_linear(x, weight, bias, k)
        return torch.autograd.grad(values, (x, weight, bias), torch.ones_like(values))

    return forward_and_backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [8, 100])
def test_memory_is_bounded_by_a_chunk_and_not_by_n_times_c(k, dtype, monkeypatch):
    chunk, width = 2**19, 8192
    set_chunk_bytes(monkeypatch, chunk)
    peaks = {}
    for n in (128, 512):
        _, peaks[n], largest = trace(train(n, width, k, dtype))
        assert largest < 2 * n * width  # bytes: not even bfloat16 logits would fit
    gradients = 2 * 4 * width * (16 + 1)  # of weight and bias, in float32 or in the dtype and float32
    assert peaks[128] - gradients < chunk
    assert peaks[512] - peaks[128] < 384 * 32 * (k + 16)  # outputs and x's gradient grow with N, and nothing else


def test_training_makes_one_product():
    products, *_ = trace(train(64, 1000, 8, torch.float32))
    assert products["addmm"] + products["mm"] == 64 * 1000 * 16
    assert products["bmm"] <= 64 * 8 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(4, 3, 1)), r"x has shape \[4, 3, 1\], expected \[N, d\]"),
        (dict(weight=torch.randn(9, 2)), r"weight has shape \[9, 2\], expected \[C, d\] with .*d=3"),
        (dict(bias=torch.randn(8)), r"bias has shape \[8\], expected \[C\] with C=9"),
        (dict(weight=torch.randn(9, 3).double()), "weight has dtype torch.float64 but x has torch.float32"),
        (dict(x=torch.ones(4, 3).long()), "x has dtype torch.int64, expected a floating-point dtype"),
        (dict(bias=torch.randn(9, device="meta")), "bias is on meta but x is on cpu"),
        (dict(k=0), "k is 0, expected 1 to 9"),
        (dict(k=10), "k is 10, expected 1 to 9"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    arguments = dict(x=torch.randn(4, 3), weight=torch.randn(9, 3), bias=torch.randn(9), k=2) | change
    with pytest.raises(ValueError, match="topk_linear: " + message):
        topk_linear(**arguments)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_operators_meet_the_librarys_contract(backend):
    x, weight, bias = leaves(layer(5, 3, 30, torch.float32))
    torch.library.opcheck(torch.ops.cocomix.topk_linear.default, (x, weight, bias, 4, backend))
    values, indices = topk_linear(x.detach(), weight.detach(), bias.detach(), 4)
    arguments = (values, indices, x.detach(), weight.detach(), True, True, backend)
    torch.library.opcheck(torch.ops.cocomix.topk_linear_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(dtype):
    def function(x, weight, bias):
        return topk_linear(x * 2, weight, bias, 4, relu=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (5, 9):
        inputs = layer(n, 3, 30, dtype)
        grads = [torch.randn(n, 4), None]
        actual, expected = run(compiled, inputs, grads), run(function, inputs, grads)
        assert torch.equal(actual[0][1], expected[0][1])
        assert relative_error(actual[0][0], expected[0][0]) < 1e-6
        assert_all_close(actual[1], expected[1], 1e-6, 1e-6)
