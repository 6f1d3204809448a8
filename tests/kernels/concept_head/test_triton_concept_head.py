"""The Triton backend of `concept_head` and `topk_linear`: outputs and gradients of the reference, errors of PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import (
    DEVICE,
    assert_all_close,
    assert_no_worse_than,
    cast,
    gpu_only,
    leaves,
    linear_layers,
    run,
    set_chunk_bytes,
    trace,
)

from cocomix_kernels import concept_head, reference, topk_linear
from cocomix_kernels.concept_head.triton_cross_entropy import cross_entropy_gradient_

N, D, C, K = 5, 6, 140, 3  # few rows: the interpreter takes a tenth of a second to sort one


@pytest.fixture(autouse=True)
def _fresh_memory_holds_nan(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def layer(n=N, d=D, width=C, dtype=torch.float32):
    """x, weight, bias and labels, of which some are missing and some tokens have none."""
    labels = torch.randint(width, (n, K)).masked_fill(torch.rand(n, K) < 0.3, -1)
    labels[::5] = -1
    tensors = (torch.randn(n, d), torch.randn(width, d), torch.randn(width))
    return [*(t.to(DEVICE, dtype) for t in tensors), labels.to(DEVICE)]


def head(k, backend="triton"):
    return lambda x, weight, bias, labels: concept_head(x, weight, bias, k, labels, backend=backend)


def true_head(k):
    return lambda x, weight, bias, labels: reference.concept_head(x, weight, bias, k, labels)


def encode(k, relu=False):
    return lambda x, weight, bias: topk_linear(x, weight, bias, k, relu=relu, backend="triton")


def some_cotangents(which, k, n=N):
    values, loss = torch.randn(n, k, device=DEVICE), torch.randn((), device=DEVICE)
    return [values if which != "loss" else None, None, loss if which != "values" else None]


def exactly(function, inputs, grads, frozen=()):
    """`function` in float64."""
    return run(function, cast(inputs, torch.float64), grads, frozen)


@pytest.mark.parametrize("which", ["values", "loss", "both"])
@pytest.mark.parametrize("k", [1, 5, 70])
def test_outputs_and_gradients_equal_the_reference(k, which):
    inputs, grads = layer(), some_cotangents(which, k)
    actual, expected = run(head(k), inputs, grads), exactly(true_head(k), inputs, grads)
    assert_all_close(actual[0], expected[0], 1e-5, 1e-5)
    assert_all_close(actual[1], expected[1], 1e-5, 1e-5)
    assert torch.equal(actual[0][1], expected[0][1])


def test_without_labels_there_is_no_loss_and_the_gradient_is_that_of_the_values():
    *inputs, _ = layer()
    grads = some_cotangents("values", 5)
    actual, expected = run(head(5), [*inputs, None], grads), exactly(true_head(5), [*inputs, None], grads)
    assert actual[0][2] is None
    assert_all_close(actual[0], expected[0], 1e-5, 1e-5)
    assert_all_close(actual[1], expected[1], 1e-5, 1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (2,), (0, 1)])
def test_frozen_inputs_get_no_gradient_and_change_no_other(frozen):
    inputs, grads = layer(), some_cotangents("both", 5)
    expected = exactly(true_head(5), inputs, grads, frozen)
    assert_all_close(run(head(5), inputs, grads, frozen)[1], expected[1], 1e-5, 1e-5)


@pytest.mark.slow
@given(
    linear_layers((torch.float32, torch.bfloat16)), st.integers(0, 5), st.sampled_from((0.0, 0.5, 1.0)),
    st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=12)
def test_any_shape_with_ties_excluded_columns_and_labels(case, n_labels, missing, seed):
    x, weight, bias, k = case
    k = min(k, 256)
    inputs = [t.to(DEVICE) for t in (x, weight, bias)]
    generator = torch.Generator().manual_seed(seed)
    shape = len(x), n_labels
    labels = torch.randint(len(weight), shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < missing] = -1
    inputs.append(labels.to(DEVICE))
    grads = [torch.randint(-3, 4, (shape[0], k)).to(DEVICE), None, torch.tensor(2.0, device=DEVICE)]
    expected = exactly(true_head(k), inputs, grads)
    actual = run(head(k), inputs, grads)
    stored = 1e-5 if x.dtype == torch.float32 else 2e-2  # of bfloat16; the interpreter rounds towards zero
    assert torch.equal(actual[0][1], expected[0][1])
    assert_all_close(actual[0], expected[0], 1e-5, 1e-5)
    assert_all_close(actual[1], expected[1], stored, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_torch_backend_in_the_same_precision(dtype):
    inputs, grads = layer(6, 16, 300, dtype), some_cotangents("both", 32, 6)
    actual, expected = run(head(32), inputs, grads), run(head(32, "torch"), inputs, grads)
    assert torch.equal(actual[0][1], expected[0][1])
    assert torch.equal(actual[0][0], expected[0][0])
    assert actual[0][2].dtype == torch.float32
    torch.testing.assert_close(actual[0][2], expected[0][2])
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    assert_all_close(actual[1], expected[1], rounding, rounding)


@pytest.mark.parametrize("chunk_bytes", [1, 1500])  # one row, and a number that leaves a ragged last chunk
def test_chunks_do_not_change_the_result(chunk_bytes, monkeypatch):
    inputs, grads = layer(), some_cotangents("both", 5)
    whole = run(head(5), inputs, grads)
    set_chunk_bytes(monkeypatch, chunk_bytes)
    chunked = run(head(5), inputs, grads)
    assert torch.equal(whole[0][1], chunked[0][1])
    assert_all_close(chunked[0], whole[0], 1e-5, 1e-5)
    assert_all_close(chunked[1], whole[1], 1e-5, 1e-5)


def test_the_same_call_gives_the_same_bits():
    inputs, grads = layer(40, 16, 50, torch.bfloat16), some_cotangents("both", 8, 40)
    first, second = (run(head(8), inputs, grads) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0] + first[1][:3], second[0] + second[1][:3], strict=True))


@pytest.mark.parametrize(("width", "dtype"), [(7, torch.float32), (700, torch.bfloat16)])
def test_a_nan_logit_reaches_the_loss_and_the_gradients(width, dtype):
    x, weight, bias, _ = layer(width=width, dtype=dtype)
    bias[5] = torch.nan
    labels = torch.zeros(N, 1, dtype=torch.int64, device=DEVICE)
    (_, _, loss), gradients = run(head(2), [x, weight, bias, labels])
    assert loss.isnan()
    assert all(g.isnan().any() for g in gradients[:3])
    assert topk_linear(x, weight, bias, 2, backend="triton")[0][:, 0].isnan().all()


def test_training_makes_three_products_and_evaluation_one(monkeypatch):
    set_chunk_bytes(monkeypatch, 2**13)
    x, weight, bias, labels = leaves(layer(12, 16, 500))

    def training():
        values, _, loss = head(8)(x, weight, bias, labels)
        return torch.autograd.grad((values, loss), (x, weight, bias), (torch.ones_like(values), torch.ones_like(loss)))

    products, *_ = trace(training)
    assert products["addmm"] + products["mm"] == 3 * 12 * 500 * 16 and not products["bmm"]
    with torch.no_grad():
        products, *_ = trace(lambda: head(8)(x, weight, bias, labels))
    assert products == {"addmm": 12 * 500 * 16}


def test_memory_is_bounded_by_a_chunk(monkeypatch):
    chunk, width = 2**15, 1024
    set_chunk_bytes(monkeypatch, chunk)
    x, weight, bias, labels = leaves(layer(24, 16, width))

    def training():
        values, _, loss = head(8)(x, weight, bias, labels)
        return torch.autograd.grad(values.sum() + loss, (x, weight, bias))

    _, peak, largest = trace(training)
    gradients = 3 * 4 * width * (16 + 1)  # of weight and bias: the loss's, the sum's, and one in the dtype
    assert largest < 4 * 24 * width
    assert peak - gradients < chunk + 2**14  # what grows with N alone


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("k", [1, 32, 140])
def test_topk_linear_equals_the_reference(k, relu):
    *inputs, _ = layer()
    grads = [torch.randn(N, k, device=DEVICE), None]
    actual = run(encode(k, relu), inputs, grads)
    expected = exactly(lambda *a: reference.topk_linear(*a, k, relu=relu), inputs, grads)
    assert torch.equal(actual[0][1], expected[0][1])
    assert_all_close(actual[0], expected[0], 1e-5, 1e-5)
    assert_all_close(actual[1], expected[1], 1e-5, 1e-5)


@pytest.mark.parametrize("frozen", [(0,), (1, 2)])
def test_topk_linear_computes_no_unwanted_gradient(frozen):
    *inputs, _ = layer()
    grads = [torch.randn(N, 4, device=DEVICE), None]
    expected = exactly(lambda *a: reference.topk_linear(*a, 4), inputs, grads, frozen)
    assert_all_close(run(encode(4), inputs, grads, frozen)[1], expected[1], 1e-5, 1e-5)


@pytest.mark.parametrize(("dtype", "k"), [(torch.float64, 4), (torch.float32, 257)])
def test_what_triton_does_not_take_is_refused_on_demand_and_left_to_torch_otherwise(dtype, k, monkeypatch):
    x, weight, bias, labels = layer(width=300, dtype=dtype)
    with pytest.raises(ValueError, match="no triton backend"):
        concept_head(x, weight, bias, k, labels, backend="triton")
    monkeypatch.setenv("COCOMIX_BACKEND", "triton")
    assert torch.equal(
        concept_head(x, weight, bias, k, labels).indices, concept_head(x, weight, bias, k, backend="torch").indices
    )


def test_the_gradient_of_the_cross_entropy_on_ragged_shapes():
    logits = torch.randn(70, 1001, device=DEVICE)
    labels = torch.randint(-1, 1001, (70, 3), dtype=torch.int32, device=DEVICE)
    labels[:, 2] = labels[:, 1]  # counted twice
    weights = torch.rand(70, 3, device=DEVICE) * (labels >= 0)
    tokens = weights.sum(1)
    onehots = torch.zeros_like(logits).scatter_add_(1, labels.long().clamp(min=0), weights)
    expected = logits.double().softmax(1) * tokens[:, None] - onehots
    sums = cross_entropy_gradient_(logits, logits.logsumexp(1), tokens, labels, weights)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(sums.double(), expected.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(dtype):
    def function(x, weight, bias, labels):
        values, indices, loss = head(4)(x * 2, weight, bias, labels)
        return values, topk_linear(x, weight, bias, 3, backend="triton")[0], loss

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        inputs = layer(n, 3, 30, dtype)
        grads = [torch.randn(n, 4, device=DEVICE), torch.randn(n, 3, device=DEVICE), torch.tensor(2.0, device=DEVICE)]
        actual, expected = run(compiled, inputs, grads), run(function, inputs, grads)
        assert_all_close(actual[0], expected[0], 1e-6, 1e-6)
        assert_all_close(actual[1], expected[1], 1e-6, 1e-6)


@gpu_only
@pytest.mark.parametrize("d", [512, 1024, 2048])
def test_paper_shapes_are_as_exact_as_pytorch(d):
    n, width, k = 2048, 32768, 32
    x, weight, bias, labels = layer(n, d, width, torch.bfloat16)
    inputs, grads = [x, weight * 0.02, bias, labels], some_cotangents("both", k, n)
    (values, indices, loss), ours = run(head(k), inputs, grads)
    logits = torch.addmm(inputs[2], inputs[0], inputs[1].t())
    assert torch.equal(indices, torch.sort(logits, dim=1, descending=True, stable=True)[1][:, :k])

    def same_selection(x, weight, bias, labels):
        logits = torch.addmm(bias, x, weight.t())
        valid = labels >= 0
        log_p = logits.to(torch.promote_types(x.dtype, torch.float32)).log_softmax(1).gather(1, labels.clamp(min=0))
        per_token = -torch.where(valid, log_p, 0).sum(1) / valid.sum(1).clamp(min=1)
        return logits.gather(1, indices), per_token.sum() / valid.any(1).sum()

    exact, exact_gradients = run(same_selection, cast(inputs, torch.float64), grads[::2])
    plain, plain_gradients = run(same_selection, inputs, grads[::2])
    assert_no_worse_than([*plain, *plain_gradients], [values, loss, *ours], [*exact, *exact_gradients])
