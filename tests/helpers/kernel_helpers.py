"""What the tests of the operations share: outputs with gradients, errors, products counted and bytes measured."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from cocomix_kernels.common import chunking

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # where the tests of Triton kernels run
gpu_only = pytest.mark.skipif(DEVICE.type == "cpu", reason="paper shapes in bfloat16 need a GPU")
WIDTHS = (1, 7, 63, 64, 65, 129, 300, 4097)  # around powers of two, by which the selection groups columns, and ragged


def cotangents(outputs):
    """A random cotangent for each differentiable output, None for the others."""
    return [torch.randn_like(o) if o is not None and o.requires_grad else None for o in outputs]


def leaves(inputs, frozen=()):
    """Fresh leaves of the inputs; floating-point ones want a gradient unless their position is frozen."""
    return [
        t.detach().clone().requires_grad_(t.is_floating_point() and i not in frozen) if torch.is_tensor(t) else t
        for i, t in enumerate(inputs)
    ]


def cast(inputs, dtype):
    """The inputs with floating-point tensors in `dtype`."""
    return [t.to(dtype) if torch.is_tensor(t) and t.is_floating_point() else t for t in inputs]


def run(function, inputs, grads=None, frozen=()):
    """Call `function`, which returns a tensor or a tuple, and back-propagate `grads` (None: no cotangent).

    Returns (outputs, gradients); the gradients are those of `leaves(inputs, frozen)`, None where there is none.
    """
    inputs = leaves(inputs, frozen)
    outputs = function(*inputs)
    outputs = (outputs,) if torch.is_tensor(outputs) else tuple(outputs)
    grads = cotangents(outputs) if grads is None else grads
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return [None if o is None else o.detach() for o in outputs], [getattr(t, "grad", None) for t in inputs]


def assert_all_close(actual, expected, rtol=1e-9, atol=1e-11):
    """Each pair is close whatever its dtype, or both are None."""
    for position, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert (a is None) == (e is None), f"position {position}: {a} against {e}"
        if a is not None:
            torch.testing.assert_close(
                a, e, rtol=rtol, atol=atol, equal_nan=True, check_dtype=False, msg=lambda m, p=position: f"{p}: {m}"
            )


def relative_error(actual, exact):
    """Norm of the error over the norm of the exact value."""
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def assert_no_worse_than(plain, actual, exact, factor=1.5):
    """Each error against the exact values is at most `factor` times the error of the plain ones."""
    for position, (p, a, e) in enumerate(zip(plain, actual, exact, strict=True)):
        if e is not None:
            ours, theirs = relative_error(a, e), relative_error(p, e)
            assert ours <= factor * theirs, f"position {position}: error {ours:.2e}, plain PyTorch {theirs:.2e}"


def set_chunk_bytes(monkeypatch, size):
    """Let the operations hold `size` bytes at a time, and one row where that is more."""
    monkeypatch.setattr(chunking, "CHUNK_BYTES", dict.fromkeys(chunking.CHUNK_BYTES, size))


def trace(function):
    """Run `function` and return (multiply-accumulates by operator, peak bytes, largest allocation in bytes).

    The peak counts what is allocated during the call. A profile, because it also sees inside custom operators.
    """
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True) as profiled:
        kept = function()
    products = Counter()
    for event in profiled.events():
        name = event.name.removeprefix("aten::").rstrip("_")
        if name in ("mm", "addmm", "bmm"):
            left, right = event.input_shapes[1:3] if name == "addmm" else event.input_shapes[:2]
            products[name] += math.prod(left) * right[-1]
    memory = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(memory, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    del kept
    return products, peak, max(e.nbytes() for e in memory)


@st.composite
def linear_layers(draw, dtypes=(torch.float32, torch.bfloat16, torch.float64)):
    """x, weight, bias and k of a linear layer whose logits are small integers, so that they tie and are exact.

    Any share of the columns may be -inf, all logits may be equal, and zeros may be signed.
    """
    n, d, width = draw(st.integers(0, 4)), draw(st.integers(1, 5)), draw(st.sampled_from(WIDTHS))
    k = draw(st.one_of(st.just(1), st.just(width), st.integers(1, min(width, 40))))
    dtype, largest = draw(st.sampled_from(dtypes)), draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x, weight, bias = (
        torch.randint(-largest, largest + 1, shape, generator=generator).to(dtype)
        for shape in ((n, d), (width, d), (width,))
    )
    excluded = draw(st.sampled_from((0, 0, width // 2, max(width - k + 1, 0), width - 1, width)))
    bias[torch.randperm(width, generator=generator)[:excluded]] = -torch.inf
    return (-x if draw(st.booleans()) else x), weight, bias, k
