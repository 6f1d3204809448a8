"""`linear_cross_entropy` against the reference."""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_all_close, assert_no_worse_than, cast, leaves, run, set_chunk_bytes, trace

from cocomix_kernels import linear_cross_entropy, reference
from cocomix_kernels.lm_loss.cross_entropy import _liger

N, D, V = 23, 6, 50
LIGER = torch.cuda.is_available() and importlib.util.find_spec("liger_kernel") is not None


def public(x, weight, labels, ignore_index):
    return linear_cross_entropy(x, weight, labels, ignore_index=ignore_index)


def layer(n=N, d=D, width=V, dtype=torch.float64, ignore_index=-100):
    """x, weight and labels, a quarter of which are ignored."""
    labels = torch.randint(width, (n,))
    labels[::4] = ignore_index
    return [torch.randn(n, d).to(dtype), torch.randn(width, d).to(dtype), labels]


def compare(inputs, ignore_index=-100, frozen=(), rtol=1e-9, atol=1e-11):
    grads = [torch.randn((), dtype=torch.float64)]
    actual = run(lambda *a: public(*a, ignore_index), inputs, grads, frozen)
    exact = cast(inputs, torch.float64)
    expected = run(lambda *a: reference.linear_cross_entropy(*a, ignore_index=ignore_index), exact, grads, frozen)
    assert_all_close(actual[0] + actual[1], expected[0] + expected[1], rtol, atol)


@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
@pytest.mark.parametrize("frozen", [(), (0,), (1,)])
def test_loss_and_gradients_equal_the_reference(ignore_index, frozen):
    compare(layer(ignore_index=ignore_index), ignore_index, frozen)


@given(
    n=st.sampled_from((1, 2, 255, 256, 257, 600)),
    d=st.integers(1, 5),
    width=st.sampled_from((1, 7, 64, 65, 300)),
    ignored=st.sampled_from((0.0, 0.5, 0.9)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=25)
def test_any_shape(n, d, width, ignored, seed):
    torch.manual_seed(seed)
    x, weight, labels = layer(n, d, width)
    labels = torch.where(torch.rand(n) < ignored, -100, labels.clamp(min=0))
    labels[-1] = width - 1
    compare([x, weight, labels])


def test_gradients_pass_gradcheck():
    x, weight, labels = leaves(layer(7, 3, 5))
    assert torch.autograd.gradcheck(lambda x, w: public(x, w, labels, -100), (x, weight))


@pytest.mark.parametrize("n", [0, 5])
def test_without_any_label_the_loss_is_nan(n):
    x, weight, labels = layer(n)
    assert public(x, weight, labels.fill_(-100), -100).isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_loss_is_in_the_accumulation_dtype(dtype):
    x, weight, labels = leaves(layer(dtype=dtype))
    loss = public(x, weight, labels, -100)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    loss.backward()
    assert x.grad.dtype == weight.grad.dtype == dtype


@pytest.mark.parametrize("rows", [2000, 25])
def test_bfloat16_is_as_exact_as_pytorch_however_many_chunks(rows, monkeypatch):
    inputs = layer(2000, 64, 500, torch.bfloat16)
    set_chunk_bytes(monkeypatch, 4 * 500 * rows)
    inputs[0] /= 8  # logits of about one, as in training
    grads = [torch.tensor(1.0)]

    def plain(x, weight, labels):
        return F.cross_entropy((x @ weight.T).to(torch.promote_types(x.dtype, torch.float32)), labels)

    exact = run(plain, cast(inputs, torch.float64), grads)
    actual = run(lambda *a: public(*a, -100), inputs, grads)
    expected = run(plain, inputs, grads)
    assert_no_worse_than(expected[1], actual[1], exact[1])
    rounding = max(1.5 * (expected[0][0] - exact[0][0]).abs(), 1e-5 * exact[0][0])
    assert (actual[0][0] - exact[0][0]).abs() <= rounding  # one scalar's error may be zero by luck


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_chunks_do_not_change_the_result(dtype, monkeypatch):
    inputs, grads = layer(dtype=dtype), [torch.tensor(0.3)]
    whole = run(lambda *a: public(*a, -100), inputs, grads)
    set_chunk_bytes(monkeypatch, V)
    by_row = run(lambda *a: public(*a, -100), inputs, grads)
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    assert_all_close(by_row[0] + by_row[1], whole[0] + whole[1], tight, tight)


def test_a_second_backward_pass_gives_the_same_gradients():
    *inputs, labels = leaves(layer())
    loss = public(*inputs, labels, -100)
    grad = torch.tensor(0.3, dtype=torch.float64)
    first = torch.autograd.grad(loss, inputs, grad, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, inputs, grad)))


def test_a_nan_reaches_the_loss():
    x, weight, labels = layer()
    x[1] = torch.nan
    assert public(x, weight, labels, -100).isnan()


def test_inputs_stay_as_they_were_under_anomaly_detection():
    inputs = leaves(layer())
    kept = [t.detach().clone() for t in inputs]
    with torch.autograd.set_detect_anomaly(True):
        public(*inputs, -100).backward()
    assert all(map(torch.equal, inputs, kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_n_times_v_elements_is_ever_held(dtype, monkeypatch):
    set_chunk_bytes(monkeypatch, 2**20)
    n, width = 4096, 1000
    inputs = leaves(layer(n, 8, width, dtype))
    _, peak, largest = trace(lambda: public(*inputs, -100).backward())
    assert largest < n * width
    assert peak < 2 * n * width


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16])
def test_labels_may_be_narrow_integers(dtype):
    x, weight, labels = layer()
    assert torch.equal(linear_cross_entropy(x, weight, labels.to(dtype)), linear_cross_entropy(x, weight, labels))


@pytest.mark.skipif(not LIGER, reason="needs Liger-Kernel and a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ligers_loss_and_gradients_equal_the_reference(dtype):
    inputs = [t.cuda() for t in layer(300, 64, 1000, dtype)]
    tolerance = 1e-2 if dtype == torch.float32 else 5e-2  # its products may run in TF32
    compare(_liger, inputs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(4)), r"x has shape \[4\], expected \[N, d\]"),
        (dict(weight=torch.randn(9, 2)), r"weight has shape \[9, 2\], expected \[V, d\] with .*d=3"),
        (dict(labels=torch.zeros(4, 1).long()), r"labels has shape \[4, 1\], expected \[N\]"),
        (dict(labels=torch.zeros(5).long()), r"labels has shape \[5\], expected \[N\] with N=4"),
        (dict(weight=torch.randn(9, 3).bfloat16()), "weight has dtype torch.bfloat16 but x has torch.float32"),
        (dict(x=torch.ones(4, 3).long()), "x has dtype torch.int64, expected a floating-point dtype"),
        (dict(labels=torch.zeros(4)), "labels has dtype torch.float32, expected "),
        (dict(weight=torch.randn(9, 3, device="meta")), "weight is on meta but x is on cpu"),
        (dict(labels=torch.zeros(4, device="meta").long()), "labels is on meta but x is on cpu"),
        (dict(labels=torch.tensor([0, 9, -100, 1])), "labels holds values from 0 to 9, expected 0 to 8"),
        (dict(labels=torch.tensor([0, -1, -100, 1])), "labels holds values from -1 to 1, expected 0 to 8"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    fitting = dict(x=torch.randn(4, 3), weight=torch.randn(9, 3), labels=torch.zeros(4).long())
    with pytest.raises(ValueError, match="linear_cross_entropy: " + message):
        linear_cross_entropy(**(fitting | change))


def test_compiles_with_graph_breaks_allowed():
    compiled = torch.compile(linear_cross_entropy, backend="aot_eager")
    inputs, grads = layer(dtype=torch.float32), [torch.tensor(1.0)]
    actual, expected = run(compiled, inputs, grads), run(linear_cross_entropy, inputs, grads)
    assert_all_close(actual[0] + actual[1], expected[0] + expected[1], 1e-5, 1e-6)
