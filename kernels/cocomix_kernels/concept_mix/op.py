"""Sparse projection of the kept concept logits, de-normalisation, and mixing with the hidden states.

Shapes: B sequences of T tokens, N = B * T, d width, C concepts, k kept concepts.
"""

# torch.library has no types for what it decorates.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cocomix_kernels.common.checks import (
    check_device,
    check_floats,
    check_integers,
    check_range,
    check_same,
    check_shapes,
)
from cocomix_kernels.common.dispatch import choose_backend
from cocomix_kernels.concept_mix.eager import torch_add, torch_mix, torch_mix_residual


@torch.library.custom_op("cocomix::concept_mix", mutates_args=())
def _mix(
    hidden: Tensor,  # [B, T, d]
    values: Tensor,  # [B, T, k]
    indices: Tensor,  # [B, T, k]
    weight: Tensor,  # [C, d]
    bias: Tensor,  # [d]
    pre_bias: Tensor,  # [d]
    mean: Tensor,  # [B, T, 1]
    std: Tensor,  # [B, T, 1]
    interleaved: bool,
    residual: bool,
) -> Tensor:
    from cocomix_kernels.concept_mix.triton_kernel import mix

    mixed = _mixed(hidden, values, indices, weight, bias, pre_bias, mean, std, interleaved, residual)
    mix(hidden, values, indices, weight, bias, pre_bias, mean, std, mixed, interleaved, residual)
    return mixed


@_mix.register_fake
def _mixed(
    hidden: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor,
    mean: Tensor,
    std: Tensor,
    interleaved: bool,
    residual: bool,
) -> Tensor:
    batch, length, width = hidden.shape
    return hidden.new_empty(batch, (2 if interleaved else 1) * length, width)


@torch.library.custom_op("cocomix::concept_mix_backward", mutates_args=())
def _mix_backward(
    grad: Tensor,  # [B, 2T, d], or [B, T, d] where the concepts were added
    values: Tensor,  # [B, T, k]
    indices: Tensor,  # [B, T, k]
    weight: Tensor,  # [C, d]
    bias: Tensor,  # [d]
    pre_bias: Tensor,  # [d]
    std: Tensor,  # [B, T, 1]
    wanted: Sequence[bool],  # gradients of values, weight, biases, mean, std
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    from cocomix_kernels.concept_mix import triton_kernel as mix

    gradients = _gradients(grad, values, indices, weight, bias, pre_bias, std, wanted)
    dvalues, dweight, dbias, dmean, dstd = (g if w else None for g, w in zip(gradients, wanted, strict=True))
    rows = mix.concept_rows(grad, values.shape[1])
    mix.token_gradients(rows, values, indices, weight, bias, pre_bias, std, dvalues, dmean, dstd)
    if dweight is not None:
        mix.weight_gradient(rows, values, indices, std, dweight)
    if dbias is not None:
        mix.bias_gradient(rows, std, dbias)
    return gradients


@_mix_backward.register_fake
def _gradients(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor,
    std: Tensor,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    like = (values, weight, bias, std.float(), std.float())
    return tuple(t.new_empty(t.shape if w else (0,)) for t, w in zip(like, wanted, strict=True))


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    _, values, indices, weight, bias, pre_bias, mean, std, interleaved, residual = inputs
    ctx.save_for_backward(values, indices, weight, bias, pre_bias, std)
    ctx.interleaved, ctx.residual, ctx.statistics_dtypes = interleaved, residual, (mean.dtype, std.dtype)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    _, values, _, weight, bias, pre_bias, mean, std, _, _ = ctx.needs_input_grad
    wanted = [values, weight, bias or pre_bias, mean and not ctx.residual, std]
    dvalues, dweight, dbias, dmean, dstd = _mix_backward(grad, *ctx.saved_tensors, wanted)
    dmean, dstd = (g.to(dtype) for g, dtype in zip((dmean, dstd), ctx.statistics_dtypes, strict=True))
    gradients = (_hidden_gradient(ctx, grad), dvalues, None, dweight, dbias, dbias, dmean, dstd, None, None)
    reached = (*ctx.needs_input_grad[:6], wanted[3], *ctx.needs_input_grad[7:])  # the residual form has no mean
    return tuple(g if w else None for g, w in zip(gradients, reached, strict=True))


def _hidden_gradient(ctx: Any, grad: Tensor) -> Tensor:
    if not ctx.interleaved:
        return grad
    return grad[:, ::2] + grad[:, 1::2] if ctx.residual else grad[:, ::2]


_mix.register_autograd(_backward, setup_context=_setup_context)


def _triton_backend(
    hidden: Tensor, values: Tensor, indices: Tensor, *rest: Tensor, interleaved: bool, residual: bool
) -> Tensor:
    wide = indices if indices.dtype in (torch.int64, torch.int32) else indices.long()
    return _mix(hidden, values, wide, *rest, interleaved, residual)


def _run(
    operation: str,
    torch_backend: Callable[..., Tensor],
    interleaved: bool,
    residual: bool,
    backend: str | None,
    hidden: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    sizes = check_shapes(
        operation,
        hidden=(hidden, "B T d"),
        values=(values, "B T k"),
        indices=(indices, "B T k"),
        weight=(weight, "C d"),
        bias=(bias, "d"),
        pre_bias=(pre_bias, "d"),
        mean=(mean, "B T 1"),
        std=(std, "B T 1"),
    )
    check_same(operation, hidden=hidden, weight=weight, bias=bias, pre_bias=pre_bias)
    check_floats(operation, values=values, mean=mean, std=std)
    check_integers(operation, indices=indices)
    check_device(operation, hidden=hidden, values=values, indices=indices, mean=mean, std=std)
    check_range(operation, "indices", indices, 0, sizes["C"])
    implementations = {"torch": torch_backend}
    if torch.float64 not in (hidden.dtype, values.dtype, mean.dtype, std.dtype):
        implementations["triton"] = partial(_triton_backend, interleaved=interleaved, residual=residual)
    run = choose_backend(operation, implementations, backend, hidden.device)
    return run(hidden, values, indices, weight, bias, pre_bias, mean, std)


def concept_mix(
    hidden: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    residual: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Compress the kept concepts into one vector a token and interleave it: h_0, c_0, h_1, c_1, ...

    hidden [B, T, d]; values, indices [B, T, k]; weight [C, d] with one row a concept; bias, pre_bias [d];
    mean, std [B, T, 1]. Returns [B, 2T, d] in hidden's dtype: even rows are hidden, odd rows
    c = (sum_j v_j W[i_j] + bias + pre_bias) * std + mean. With `residual` odd rows are hidden + c - mean instead, so
    that they begin with what their tokens have; the mean cancels and gets no gradient. hidden, weight and the biases
    share a dtype; values, mean and std may have a higher one. Sums are in float32 (float64, which has no triton
    backend, for float64). Gradients reach every other floating-point input and are deterministic in the triton backend.

    Source: CoCoMix (arXiv 2502.08524), section 3: mixing and interleaving; the residual form is this project's. Raises
    `ValueError` for shapes, dtypes, devices or indices that do not fit.
    """
    of_concepts = (values, indices, weight, bias, pre_bias, mean, std)
    run = torch_mix_residual if residual else torch_mix
    return _run("concept_mix", run, True, residual, backend, hidden, *of_concepts)


def concept_add(
    hidden: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Compress the kept concepts into one vector a token and add it: h_t + c_t.

    Arguments, precision, gradients and errors as for `concept_mix`; returns [B, T, d] in hidden's dtype.

    Source: CoCoMix (arXiv 2502.08524), the comparison with adding the concept ("intervention").
    """
    of_concepts = (values, indices, weight, bias, pre_bias, mean, std)
    return _run("concept_add", torch_add, False, False, backend, hidden, *of_concepts)
