"""The Triton backend of `interleaved_attention` in both forms against the reference: outputs, gradients, precision."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import DEVICE, assert_all_close, assert_no_worse_than, cast, gpu_only, leaves, run

from cocomix_kernels import interleaved_attention, reference
from cocomix_kernels.attention import triton_kernel as attention
from cocomix_kernels.common.launch import ceil_div
from cocomix_kernels.common.recording import recording

FORMS = pytest.mark.parametrize("concept_queries", [False, True], ids=["every query", "concept queries"])
CHIPS = (8, 9, 10)
triton_attention = partial(interleaved_attention, backend="triton")
# Triton's interpreter truncates float32 to bfloat16, which makes the error of rounding twice as large.
FACTOR = {torch.float16: 1.5, torch.bfloat16: 1.5 if DEVICE.type == "cuda" else 3.5}


@pytest.fixture(autouse=True)
def _fresh_buffers_hold_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def heads(length, concept_queries, batch=1, n_heads=2, size=16, dtype=torch.float32):
    """q, k and v as slices of one product, so not contiguous; queries at the odd positions or at all."""
    qkv = torch.randn(batch, 2 * length, 3 * n_heads * size, device=DEVICE).to(dtype)
    q, k, v = (t.unflatten(2, (n_heads, size)) for t in qkv.chunk(3, dim=2))
    return [q[:, 1::2] if concept_queries else q, k, v]


def both(qkv, tolerance=2e-5, **keywords):
    """Compare outputs and gradients with the reference's in float64."""
    grads = [torch.randn(qkv[0].shape, device=DEVICE)]
    actual = run(partial(triton_attention, **keywords), qkv, grads)
    expected = run(partial(reference.interleaved_attention, **keywords), cast(qkv, torch.float64), grads)
    assert_all_close(actual[0] + actual[1], expected[0] + expected[1], tolerance, tolerance)


def plain(q, k, v):
    """What PyTorch computes with a mask, in the inputs' precision."""
    positions = torch.arange(k.shape[1], device=k.device)
    mask = positions <= positions[k.shape[1] // q.shape[1] - 1 :: k.shape[1] // q.shape[1], None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def assert_as_exact_as_pytorch(qkv, factor):
    """The outputs and gradients, each against the float64 reference."""
    grads = [torch.randn(qkv[0].shape, device=DEVICE).to(qkv[0].dtype)]
    exact = run(reference.interleaved_attention, cast(qkv, torch.float64), grads)
    outputs, gradients = run(triton_attention, qkv, grads)
    assert all(t.dtype == qkv[0].dtype for t in outputs + gradients)
    assert_no_worse_than(sum(run(plain, qkv, grads), []), outputs + gradients, sum(exact, []), factor)


@FORMS
@pytest.mark.parametrize(
    ("length", "shape", "scale"),
    [
        (1, dict(size=64), None), (7, dict(size=128), 0.3), (7, dict(batch=3, n_heads=1), -0.7), (5, {}, 0.0),
        (64, dict(batch=2, n_heads=1), None), (129, dict(size=64, n_heads=1), None),
        pytest.param(129, dict(size=128, n_heads=1), 0.05, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_outputs_and_gradients_equal_the_reference(length, shape, scale, concept_queries):
    both(heads(length, concept_queries, **shape), scale=scale)


@pytest.mark.slow
@FORMS
def test_a_thousand_tokens_equal_the_reference(concept_queries):
    both(heads(1000, concept_queries, n_heads=1))


@given(
    concept_queries=st.booleans(), length=st.integers(0, 40), batch=st.integers(0, 2), n_heads=st.integers(1, 3),
    size=st.sampled_from((1, 3, 8, 16, 20, 32, 64, 72, 128)), magnitude=st.sampled_from((0.0, 1.0, 30.0)),
    seed=st.integers(0, 2**32),
)  # fmt: skip
@settings(max_examples=12)
def test_any_shape_and_sharpness(concept_queries, length, batch, n_heads, size, magnitude, seed):
    torch.manual_seed(seed)
    q, k, v = heads(length, concept_queries, batch, n_heads, size)
    both([q * magnitude, k, v], 1e-3 if magnitude > 1 else 2e-5)


@FORMS
@pytest.mark.parametrize("size", [16, 72])
@pytest.mark.parametrize(("chip", "dtype"), [(8, torch.float16), (9, torch.bfloat16), (10, torch.float16)])
def test_every_configuration_is_as_exact_as_pytorch(chip, dtype, size, concept_queries, monkeypatch):
    if DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] < chip:
        pytest.skip("a configuration of a newer GPU")
    monkeypatch.setattr(attention, "compute_capability", lambda device: (chip, 0))
    assert_as_exact_as_pytorch(heads(150, concept_queries, n_heads=1, size=size, dtype=dtype), FACTOR[dtype])


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("key", attention.CONFIGURATIONS[9])
def test_blocks_fit_on_the_diagonal_of_both_forms(chip, key):
    block_m, block_n, warps, stages = attention.CONFIGURATIONS[chip][key]
    assert warps in (4, 8) and stages in (1, 2, 3)
    assert key[0] == attention.KEYS or block_m % block_n == 0  # else keys of no query of the block are read unmasked
    assert key[0] != attention.KEYS or block_n % 2 == 0 and max(block_m, block_n // 2) % min(block_m, block_n // 2) == 0


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("size", [64, 128])
def test_concept_queries_take_little_more_than_half_the_arithmetic(chip, size):
    def scores(which, step, length=1024):
        """Scores that a pass computes a head, over all its tiles."""
        block_m, block_n, *_ = attention.CONFIGURATIONS[chip][which, size, 2]
        n_keys, n_queries = 2 * length, 2 * length // step
        if which == attention.KEYS:
            tiles = (ceil_div(n_queries - key // step, block_m) for key in range(0, n_keys, block_n))
        else:
            tiles = (step * (row + block_m) // block_n for row in range(0, n_queries, block_m))
        return block_m * block_n * sum(tiles)

    products = {attention.FORWARD: 2, attention.QUERIES: 3, attention.KEYS: 4}
    concept, full = (sum(n * scores(which, step) for which, n in products.items()) for step in (2, 1))
    assert concept <= 0.525 * full


@FORMS
def test_strided_views_are_read_where_they_are(concept_queries):
    qkv = [t.requires_grad_() for t in heads(6, concept_queries)]
    with recording((9, 0)) as launches:
        triton_attention(*qkv).sum().backward()
    assert [launch.kernel.__name__ for launch in launches] == ["_forward", "_backward_queries", "_backward_keys"]
    for launch in launches:
        assert [t.data_ptr() for t in launch.arguments[:3]] == [t.data_ptr() for t in qkv]


@FORMS
def test_gradients_reach_slices_of_one_product(concept_queries):
    x = torch.randn(2, 14, 24, device=DEVICE, requires_grad=True)
    cotangent = torch.randn(2, 7 if concept_queries else 14, 1, 8, device=DEVICE)

    def gradient(function):
        q, k, v = x.unflatten(2, (1, 24)).chunk(3, dim=3)
        return torch.autograd.grad(function(q[:, 1::2] if concept_queries else q, k, v), x, cotangent)

    assert_all_close(gradient(triton_attention), gradient(reference.interleaved_attention), 2e-5, 2e-5)


@FORMS
def test_any_strides_give_the_same_and_inputs_stay_as_they_were(concept_queries):
    qkv = [t.contiguous() for t in heads(7, concept_queries, batch=2)]
    grads = [torch.randn(qkv[0].shape, device=DEVICE)]
    expected = run(triton_attention, qkv, grads)
    for order in ((3, 1, 0, 2), (0, 2, 3, 1), (0, 2, 1, 3)):
        back = sorted(range(4), key=order.__getitem__)
        inputs = [t.permute(order).contiguous().permute(back).requires_grad_() for t in qkv]
        out = triton_attention(*inputs)
        found = torch.autograd.grad(out, inputs, grads[0].permute(order).contiguous().permute(back))
        assert_all_close([out, *found], expected[0] + expected[1], 0, 0)
        assert all(map(torch.equal, inputs, qkv))
    inputs = leaves(qkv)
    triton_attention(*inputs).sum().backward()  # one gradient for all elements, expanded
    ones = run(triton_attention, qkv, [torch.ones_like(grads[0])])[1]
    assert_all_close([t.grad for t in inputs], ones, 0, 0)


def test_concept_queries_give_the_odd_rows_of_the_full_form():
    q, k, v = heads(129, False)
    full = triton_attention(q, k, v)
    assert_all_close([triton_attention(q[:, 1::2], k, v)], [full[:, 1::2]], 1e-5, 1e-5)


def test_a_concept_query_sees_its_own_position_and_nothing_later():
    q, k, v = leaves(heads(70, True, n_heads=1))
    out = triton_attention(q, k, v)
    for row in (0, 1, 31, 32, 63, 64, 69):
        for gradient in torch.autograd.grad(out[0, row].sum(), (k, v), retain_graph=True):
            seen = gradient[0, :, 0].abs().sum(1) > 0
            assert seen[: 2 * row + 2].all() and not seen[2 * row + 2 :].any()


@FORMS
def test_a_nan_reaches_the_rows_that_see_it_and_no_earlier_block(concept_queries):
    q, k, v = heads(100, concept_queries, n_heads=1)
    v[:, 151] = torch.nan
    rows = triton_attention(q, k, v).isnan().flatten(2).any(2)[0]
    first = 75 if concept_queries else 151
    assert rows[first:].all() and not rows[:64].any()


@FORMS
@pytest.mark.parametrize("size", [12, 16])
def test_heads_and_sequences_do_not_see_each_other(size, concept_queries):
    qkv = leaves(heads(70, concept_queries, batch=2, n_heads=3, size=size))
    alone = [t.detach()[:1, :, 1:2].clone().requires_grad_() for t in qkv]
    with torch.no_grad():
        for t in qkv:
            t[:, :, ::2] = torch.nan
            t[1] = torch.nan
    results = []
    for inputs in (qkv, alone):
        out = triton_attention(*inputs)[:1, :, 1 if inputs is qkv else 0]
        gradients = torch.autograd.grad(out.square().sum(), inputs)
        results.append([out, *(g[:1, :, 1 if inputs is qkv else 0] for g in gradients)])
    assert_all_close(*results, 1e-6, 1e-6)
    assert all(t.isfinite().all() for t in results[0])


@FORMS
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_frozen_inputs_get_no_gradient_and_change_no_other(wanted, concept_queries):
    qkv = heads(7, concept_queries)
    frozen = [i for i in range(3) if i != wanted]
    grads = [torch.randn(qkv[0].shape, device=DEVICE)]
    expected = run(reference.interleaved_attention, cast(qkv, torch.float64), grads, frozen)
    assert_all_close(run(triton_attention, qkv, grads, frozen)[1], expected[1], 2e-5, 2e-5)


@FORMS
def test_a_second_backward_pass_gives_the_same_gradients_bit_for_bit(concept_queries):
    qkv = leaves(heads(40, concept_queries))
    out = triton_attention(*qkv)
    cotangent = torch.randn_like(out)
    first = torch.autograd.grad(out, qkv, cotangent, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, qkv, cotangent)))


@FORMS
@pytest.mark.parametrize("change", [dict(dtype=torch.float64), dict(size=136)])
def test_what_the_kernels_lack_is_refused_on_demand_and_left_to_torch_otherwise(change, concept_queries, monkeypatch):
    qkv = heads(3, concept_queries, **change)
    with pytest.raises(ValueError, match="no triton backend exists"):
        triton_attention(*qkv)
    monkeypatch.setenv("COCOMIX_BACKEND", "triton")
    assert_all_close([interleaved_attention(*qkv)], [reference.interleaved_attention(*qkv)], 1e-5, 1e-5)


@FORMS
def test_compiles_into_one_graph_forward_and_backward(concept_queries):
    def function(q, k, v):
        return triton_attention(q * 2, k, v, scale=0.3)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (5, 8):
        qkv = heads(length, concept_queries)
        grads = [torch.randn(qkv[0].shape, device=DEVICE)]
        actual, expected = run(compiled, qkv, grads), run(function, qkv, grads)
        assert_all_close(actual[0] + actual[1], expected[0] + expected[1], 1e-6, 1e-6)


@FORMS
def test_is_registered_as_pytorch_expects_an_operator(concept_queries):
    torch.use_deterministic_algorithms(False)  # it compares fresh buffers of operators that write none
    arguments = [t.requires_grad_() for t in heads(3, concept_queries)]
    torch.library.opcheck(torch.ops.cocomix.interleaved_attention.default, (*arguments, 0.25, "triton"))


@gpu_only
@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n_heads", "size"), [(8, 64), (4, 128)])
@pytest.mark.parametrize("length", [1024, 1000])
def test_paper_shapes_are_as_exact_as_pytorch(length, n_heads, size, dtype, concept_queries):
    assert_as_exact_as_pytorch(heads(length, concept_queries, 4, n_heads, size, dtype), 1.5)
