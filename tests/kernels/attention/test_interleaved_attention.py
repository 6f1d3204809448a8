"""`interleaved_attention` in both forms against its reference."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_helpers import assert_all_close, assert_no_worse_than, cast, leaves, relative_error, run

from cocomix_kernels import interleaved_attention, reference

OPERATION = sys.modules[interleaved_attention.__module__]

FORMS = pytest.mark.parametrize("concept_queries", [False, True], ids=["every query", "concept queries"])


def heads(length, concept_queries, batch=2, n_heads=3, size=8, dtype=torch.float64):
    """q, k and v as slices of one product, so not contiguous; queries at the odd positions or at all."""
    qkv = torch.randn(batch, 2 * length, 3 * n_heads * size, dtype=dtype)
    q, k, v = (t.unflatten(2, (n_heads, size)) for t in qkv.chunk(3, dim=2))
    return [q[:, 1::2] if concept_queries else q, k, v]


def strided_leaves(qkv):
    """Leaves that keep the strides, which `leaves` does not for slices."""
    return [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t).requires_grad_() for t in qkv]


@FORMS
@pytest.mark.parametrize("length", [1, 7, 129])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("shape", [dict(batch=1, n_heads=1), dict(batch=2, n_heads=3), dict(size=64)])
def test_outputs_and_gradients_equal_the_reference(length, scale, shape, concept_queries):
    qkv = heads(length, concept_queries, **shape)
    grads = [torch.randn(qkv[0].shape, dtype=torch.float64)]
    actual = run(lambda *a: interleaved_attention(*a, scale=scale), qkv, grads)
    expected = run(lambda *a: reference.interleaved_attention(*a, scale=scale), qkv, grads)
    assert_all_close(actual[0], expected[0])
    assert_all_close(actual[1], expected[1])


@FORMS
@given(
    length=st.integers(1, 12),
    batch=st.integers(1, 3),
    n_heads=st.integers(1, 3),
    size=st.integers(1, 20),
    magnitude=st.sampled_from((0.0, 1.0, 30.0)),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30)
def test_any_shape_and_sharpness(concept_queries, length, batch, n_heads, size, magnitude, seed):
    torch.manual_seed(seed)
    q, k, v = heads(length, concept_queries, batch, n_heads, size)
    inputs, grads = [q * magnitude, k, v], [torch.randn(q.shape, dtype=torch.float64)]
    actual = run(interleaved_attention, inputs, grads)
    expected = run(reference.interleaved_attention, inputs, grads)
    assert_all_close(actual[0] + actual[1], expected[0] + expected[1], 1e-7, 1e-9)


@FORMS
@pytest.mark.parametrize("length", [1, 3])
def test_gradients_pass_gradcheck(length, concept_queries):
    assert torch.autograd.gradcheck(interleaved_attention, leaves(heads(length, concept_queries, 1, 2, 3)))


@FORMS
def test_gradients_reach_slices_of_one_product(concept_queries):
    x = torch.randn(2, 14, 24, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, 7 if concept_queries else 14, 1, 8, dtype=torch.float64)

    def gradient(function):
        q, k, v = x.unflatten(2, (1, 24)).chunk(3, dim=3)
        out = function(q[:, 1::2] if concept_queries else q, k, v)
        return torch.autograd.grad(out, x, cotangent)

    assert_all_close(gradient(interleaved_attention), gradient(reference.interleaved_attention))


@FORMS
def test_strides_do_not_matter(concept_queries):
    qkv = heads(7, concept_queries)
    strided, plain = strided_leaves(qkv), leaves([t.contiguous() for t in qkv])
    cotangent = torch.randn(2, 3, 8, qkv[0].shape[1], dtype=torch.float64).permute(0, 3, 1, 2)
    assert not strided[0].is_contiguous() and not cotangent.is_contiguous()
    results = []
    for inputs in (strided, plain):
        out = interleaved_attention(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, cotangent)])
    assert_all_close(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("length", [1, 7, 129])
def test_concept_queries_give_the_odd_rows_of_the_full_form(length, dtype):
    q, k, v = heads(length, False, size=64, dtype=dtype)
    full = interleaved_attention(q, k, v)
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    assert_all_close([interleaved_attention(q[:, 1::2], k, v)], [full[:, 1::2]], tight, tight)


def test_a_concept_query_sees_its_own_position_and_nothing_later():
    q, k, v = leaves(heads(5, True, 1, 1, 4))
    for row in range(5):
        out = interleaved_attention(q, k, v)[0, row].sum()
        for gradient in torch.autograd.grad(out, (k, v)):
            seen = gradient[0, :, 0].abs().sum(1) > 0
            assert seen[: 2 * row + 2].all() and not seen[2 * row + 2 :].any()


@FORMS
@pytest.mark.parametrize("length", [1, 7, 129])
def test_bfloat16_is_as_exact_as_pytorch(length, concept_queries):
    qkv = heads(length, concept_queries, 2, 4, 64, torch.bfloat16)
    grads = [torch.randn(qkv[0].shape)]

    def plain(q, k, v):
        positions = torch.arange(2 * length)
        mask = positions <= (positions[1::2] if concept_queries else positions)[:, None]
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

    exact = run(reference.interleaved_attention, cast(qkv, torch.float64), grads)
    assert_no_worse_than(*(sum(run(f, qkv, grads), []) for f in (plain, interleaved_attention)), sum(exact, []))


@FORMS
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_frozen_inputs_get_no_gradient_and_change_no_other(wanted, concept_queries):
    qkv = heads(7, concept_queries)
    frozen = [i for i in range(3) if i != wanted]
    grads = [torch.randn(qkv[0].shape, dtype=torch.float64)]
    expected = run(reference.interleaved_attention, qkv, grads, frozen)
    assert_all_close(run(interleaved_attention, qkv, grads, frozen)[1], expected[1])


@FORMS
def test_a_second_backward_pass_gives_the_same_gradients(concept_queries):
    qkv = leaves(heads(7, concept_queries))
    out = interleaved_attention(*qkv)
    cotangent = torch.randn_like(out)
    first = torch.autograd.grad(out, qkv, cotangent, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(out, qkv, cotangent)))


@FORMS
def test_inputs_stay_as_they_were_under_anomaly_detection(concept_queries):
    qkv = leaves(heads(7, concept_queries))
    kept = [t.detach().clone() for t in qkv]
    with torch.autograd.set_detect_anomaly(True):
        interleaved_attention(*qkv).sum().backward()
    assert all(map(torch.equal, qkv, kept))


@FORMS
def test_a_nan_reaches_the_rows_that_see_it(concept_queries):
    q, k, v = heads(6, concept_queries)
    v[:, 7] = torch.nan
    rows = interleaved_attention(q, k, v).isnan().flatten(2).any(2)[0]
    assert rows[3 if concept_queries else 7 :].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(q=torch.randn(2, 5, 3, 8)), r"q has shape \[2, 5, 3, 8\], expected \[B, 4, H, D\] with B=2, H=3, D=8"),
        (dict(q=torch.randn(1, 8, 3, 8)), r"q has shape \[1, 8, 3, 8\], expected \[B, 8, H, D\] with B=2"),
        (dict(q=torch.randn(2, 4, 24)), r"q has shape \[2, 4, 24\], expected \[B, 4, H, D\]"),
        (dict(q=torch.randn(2, 4, 3, 9)), r"q has shape \[2, 4, 3, 9\], expected .* with .*D=8"),
        (dict(k=torch.randn(2, 24)), r"k has shape \[2, 24\], expected \[B, S, H, D\]"),
        (dict(v=torch.randn(2, 8, 2, 8)), r"v has shape \[2, 8, 2, 8\], expected \[B, S, H, D\] with .*H=3"),
        (dict(v=torch.randn(2, 8, 3, 8).double()), "v has dtype torch.float64 but q has torch.float32"),
        (dict(q=torch.ones(2, 4, 3, 8).long()), "q has dtype torch.int64, expected a floating-point dtype"),
        (dict(k=torch.randn(2, 8, 3, 8, device="meta")), "k is on meta but q is on cpu"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, message):
    fitting = dict(q=torch.randn(2, 4, 3, 8), k=torch.randn(2, 8, 3, 8), v=torch.randn(2, 8, 3, 8))
    with pytest.raises(ValueError, match="interleaved_attention: " + message):
        interleaved_attention(**(fitting | change))


def test_an_odd_number_of_positions_has_no_concept_queries():
    q, k = torch.randn(2, 3, 3, 8), torch.randn(2, 7, 3, 8)
    with pytest.raises(ValueError, match=r"k has 7 positions, expected an even number \(2T\)"):
        interleaved_attention(q, k, k)
    expected = F.scaled_dot_product_attention(*(k.transpose(1, 2),) * 3, is_causal=True).transpose(1, 2)
    torch.testing.assert_close(interleaved_attention(k, k, k), expected)


@FORMS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_into_one_graph(dtype, concept_queries):
    def function(q, k, v):
        return interleaved_attention(q * 2, k, v, scale=0.3)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (5, 8):
        qkv = heads(length, concept_queries, dtype=dtype)
        grads = [torch.randn(qkv[0].shape)]
        actual, expected = run(compiled, qkv, grads), run(function, qkv, grads)
        tight = 1e-5 if dtype == torch.float32 else 2e-2
        assert_all_close(actual[0] + actual[1], expected[0] + expected[1], tight, tight)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """The public function of flash_attn 2, which takes [B, S, H, D] and strided views."""
    assert causal and not dropout_p and not return_attn_probs
    assert deterministic == torch.are_deterministic_algorithms_enabled()
    return reference.interleaved_attention(q, k, v, scale=softmax_scale)


def masked_scores(q, k, scale):
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
    return scores.masked_fill(torch.ones(scores.shape[2:]).triu(1).bool(), -torch.inf)


def _flash_attn_fwd(q, k, v, *, softmax_scale=None, causal=False, return_lse=False):
    """Of flash_attn 4: what torch.nn.attention calls, too."""
    assert causal and return_lse
    out = reference.interleaved_attention(q, k, v, scale=softmax_scale)
    lse = masked_scores(q, k, softmax_scale).logsumexp(3)  # [B, H, S], whatever the strides
    return out, lse.transpose(1, 2).contiguous().transpose(1, 2)


def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, *, deterministic=False):
    assert causal and deterministic == torch.are_deterministic_algorithms_enabled() and lse.is_contiguous()
    p = (masked_scores(q, k, softmax_scale) - lse[..., None]).exp()
    dp = torch.einsum("bqhd,bkhd->bhqk", dout.float(), v.float())
    ds = p * (dp - (out.float() * dout.float()).sum(3).transpose(1, 2)[..., None]) * softmax_scale
    dq, dk = torch.einsum("bhqk,bkhd->bqhd", ds, k.float()), torch.einsum("bhqk,bqhd->bkhd", ds, q.float())
    return tuple(g.to(q.dtype) for g in (dq, dk, torch.einsum("bhqk,bqhd->bkhd", p, dout.float())))


@pytest.fixture
def install(monkeypatch):
    """Pretend that these versions of flash_attn are installed, on a GPU of this capability."""

    def pretend(*versions, capability=(9, 0)):
        package, cute, interface = (ModuleType(f"flash_attn{end}") for end in ("", ".cute", ".cute.interface"))
        if 2 in versions:
            package.flash_attn_func = flash_attn_func
        if 4 in versions:
            interface._flash_attn_fwd, interface._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
        for module in (package, cute, interface):
            installed = versions and (4 in versions or module is package)
            monkeypatch.setitem(sys.modules, module.__name__, module if installed else None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        OPERATION._flash_versions.cache_clear()

    yield pretend
    OPERATION._flash_versions.cache_clear()


def on_gpu(dtype=torch.bfloat16, size=64):
    """What the choice of a backend reads of a query on a GPU."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, 4, 2, size))


@pytest.mark.parametrize("version", [2, 4])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("scale", [None, 0.05])
def test_flash_attn_is_called_as_its_interface_wants(install, version, compiled, scale):
    install(version)
    qkv = heads(6, False, size=64, dtype=torch.bfloat16)
    grads = [torch.randn(qkv[0].shape)]

    def function(q, k, v):
        return OPERATION._flash_backend(q * 2, k, v, scale)

    torch.compiler.reset()
    actual = run(torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function, qkv, grads)
    exact = cast(qkv, torch.float64)
    expected = run(lambda q, k, v: reference.interleaved_attention(q * 2, k, v, scale=scale), exact, grads)
    pairs = zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)
    assert all(relative_error(a, e) < 1e-2 for a, e in pairs)


def test_flash_attn_is_deterministic_where_that_is_demanded(install):
    torch.use_deterministic_algorithms(True)
    try:
        for version in (2, 4):
            install(version)
            q, k, v = leaves(heads(3, False, size=64, dtype=torch.bfloat16))
            OPERATION._flash_backend(q, k, v, 0.1).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("installed", "capability", "dtype", "size", "version"),
    [
        ((), (9, 0), torch.bfloat16, 64, ""),
        ((2,), (9, 0), torch.bfloat16, 64, "2"),
        ((4,), (9, 0), torch.float16, 128, "4"),
        ((2, 4), (10, 0), torch.bfloat16, 64, "4"),
        ((2, 4), (8, 0), torch.bfloat16, 64, "2"),
        ((2, 4), (9, 0), torch.bfloat16, 256, "2"),
        ((4,), (8, 0), torch.bfloat16, 64, ""),
        ((2, 4), (9, 0), torch.float32, 64, ""),
        ((2,), (7, 5), torch.float16, 64, ""),
    ],
)
def test_the_default_on_a_gpu_is_flash_attn_where_it_fits_and_triton_for_concept_queries(
    install, installed, capability, dtype, size, version
):
    install(*installed, capability=capability)
    q = on_gpu(dtype, size)
    assert OPERATION._flash_version(q.device, dtype, size) == version
    assert OPERATION._default(q, False) == ("flash" if version else "torch")
    assert OPERATION._default(q, True) == "triton"
    if not version:
        with pytest.raises(ValueError, match=f"no flash_attn is installed that takes {dtype} and heads of {size}"):
            OPERATION._flash_backend(q, None, None, None)


def test_cudnn_is_the_only_kernel_that_may_run(monkeypatch):
    allowed = []

    def attention(q, k, v, **keywords):
        cuda = torch.backends.cuda
        allowed.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()))
        assert keywords == dict(is_causal=True, scale=0.3)
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    q, k, v = heads(3, False)
    assert torch.equal(OPERATION._implementations(q, False)["cudnn"](q, k, v, 0.3), v)
    assert allowed == [(True, False, False)] and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("backend", ["flash", "cudnn"])
def test_libraries_need_a_gpu_and_every_query(backend):
    q, k, v = heads(3, False)
    with pytest.raises(ValueError, match=f"the {backend} backend needs CUDA tensors, these are on cpu"):
        interleaved_attention(q, k, v, backend=backend)
    message = f"of concept queries: backend is '{backend}', expected one of torch, triton$"
    with pytest.raises(ValueError, match=message):
        interleaved_attention(q[:, 1::2], k, v, backend=backend)
