"""Concept mixing in one kernel forward, and what its backward pass shares.

Shapes: B sequences of T tokens, N = B * T, d width, C concepts, k kept concepts.

Forward reads h and k rows of the weight a token and writes the mixed sequence; the concept vector exists in registers
only. Backward reads the concept rows of the gradient in place, at odd positions of the doubled sequence, and of the
k sampled dots <g, W_j> it takes three gradients: that of the values (times std), and that of std, because
<g, sum_j v_j W_j> = sum_j v_j <g, W_j>. So the projection is neither kept nor computed again, nor recovered from the
output, where rounding would cost its precision. The gradient of the weight is a scatter by concept, those of the
biases a scatter into one row; both are deterministic.
"""

# Triton's language has types of its own, which checkers take for something else.
# pyright: basic

import torch
import triton
import triton.language as tl

from cocomix_kernels.common.launch import ceil_div, launch
from cocomix_kernels.common.sparse_rows import (
    UNROLL,
    dot_rows,
    gathered_sum,
    load_row,
    plan_by_concept,
    plan_for_total,
    row_dots,
    scatter_rows,
    slice_width,
    store_row,
    with_contiguous_rows,
)


@triton.jit
def _mix(
    hidden,
    values,
    indices,
    weight,
    bias,
    pre_bias,
    mean,
    std,
    mixed,
    hidden_stride,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
    STEP: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = load_row(hidden + token * hidden_stride + columns, columns, D, BLOCK)
    concept = gathered_sum(values + token * K, indices + token * K, weight, columns, D, BLOCK, K, STEP)
    concept += load_row(bias + columns, columns, D, BLOCK) + load_row(pre_bias + columns, columns, D, BLOCK)
    concept *= tl.load(std + token).to(tl.float32)
    concept += state if RESIDUAL else tl.load(mean + token).to(tl.float32)
    if INTERLEAVED:
        store_row(mixed + 2 * token * D + columns, state, columns, D, BLOCK)
        store_row(mixed + (2 * token + 1) * D + columns, concept, columns, D, BLOCK)
    else:
        store_row(mixed + token * D + columns, state + concept, columns, D, BLOCK)


@triton.jit
def _mix_gradients(
    grad,
    values,
    indices,
    weight,
    bias,
    pre_bias,
    std,
    dvalues,
    dmean,
    dstd,
    grad_stride,
    d,
    k,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    row = grad + token * grad_stride
    total, by_bias = tl.zeros([BLOCK], dtype=tl.float32), tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, d, BLOCK):  # d = D, but no constant: unrolled, this loop and the next would spill
        columns = start + tl.arange(0, BLOCK)
        g = load_row(row + columns, columns, D, BLOCK)
        total += g
        if dstd is not None:
            by_bias += g * load_row(bias + columns, columns, D, BLOCK)
            by_bias += g * load_row(pre_bias + columns, columns, D, BLOCK)
    if dmean is not None:
        tl.store(dmean + token, tl.sum(total, axis=0))
    if dvalues is not None or dstd is not None:
        scale = tl.load(std + token).to(tl.float32)
        by_rows = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, k, ROWS):
            kept = start + tl.arange(0, ROWS)
            concepts = tl.load(indices + token * k + kept, mask=kept < k, other=0)
            dots = row_dots(row, concepts, weight, D, BLOCK, ROWS)
            if dvalues is not None:
                tl.store(dvalues + token * k + kept, (dots * scale).to(dvalues.dtype.element_ty), mask=kept < k)
            if dstd is not None:
                value = tl.load(values + token * k + kept, mask=kept < k, other=0.0).to(tl.float32)
                by_rows += tl.where(kept < k, value * dots, 0.0)
        if dstd is not None:
            tl.store(dstd + token, tl.sum(by_rows, axis=0) + tl.sum(by_bias, axis=0))


def mix(
    hidden: torch.Tensor,  # [B, T, d]
    values: torch.Tensor,  # [B, T, k]
    indices: torch.Tensor,  # [B, T, k] int64 or int32
    weight: torch.Tensor,  # [C, d]
    bias: torch.Tensor,  # [d]
    pre_bias: torch.Tensor,  # [d]
    mean: torch.Tensor,  # [B, T, 1]
    std: torch.Tensor,  # [B, T, 1]
    mixed: torch.Tensor,  # [B, 2T, d] if interleaved, else [B, T, d]
    interleaved: bool,
    residual: bool,
) -> None:
    """Write hidden and c = (sum_j v_j W[i_j] + bias + pre_bias) * std + mean interleaved, or their sum; with `residual`
    hidden and hidden + c - mean interleaved."""
    k, d = values.shape[2], hidden.shape[2]
    rows = with_contiguous_rows(hidden.flatten(0, 1))
    block = slice_width(d, weight.itemsize)
    launch(
        _mix,
        (rows.shape[0], ceil_div(d, block)),
        rows,
        values.contiguous(),
        indices.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        pre_bias.contiguous(),
        mean.contiguous(),
        std.contiguous(),
        mixed,
        rows.stride(0),
        D=d,
        BLOCK=block,
        K=k,
        STEP=UNROLL,
        INTERLEAVED=interleaved,
        RESIDUAL=residual,
        num_warps=1,
        num_stages=1,
    )


def concept_rows(grad: torch.Tensor, length: int) -> torch.Tensor:
    """The rows of grad [B, 2T, d] at odd positions, or all rows of grad [B, T, d], as a view [N, d]."""
    grad = grad.contiguous()
    return grad.view(-1, grad.shape[1] // max(1, length), grad.shape[2])[:, -1] if grad.numel() else grad.flatten(0, 1)


def token_gradients(
    rows: torch.Tensor,  # [N, d] gradient of the concepts
    values: torch.Tensor,  # [B, T, k]
    indices: torch.Tensor,  # [B, T, k] int64 or int32
    weight: torch.Tensor,  # [C, d]
    bias: torch.Tensor,  # [d]
    pre_bias: torch.Tensor,  # [d]
    std: torch.Tensor,  # [B, T, 1]
    dvalues: torch.Tensor | None,  # [B, T, k]
    dmean: torch.Tensor | None,  # [B, T, 1] float32
    dstd: torch.Tensor | None,  # [B, T, 1] float32
) -> None:
    """Write the gradients of values, mean and std, those that are not None."""
    if dvalues is None and dmean is None and dstd is None:
        return
    k, d = values.shape[2], weight.shape[1]
    launch(
        _mix_gradients,
        (rows.shape[0],),
        rows,
        values.contiguous(),
        indices.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        pre_bias.contiguous(),
        std.contiguous(),
        dvalues,
        dmean,
        dstd,
        rows.stride(0),
        d,
        k,
        D=d,
        BLOCK=slice_width(d, weight.itemsize),
        ROWS=dot_rows(k),
        num_warps=1,
        num_stages=1,
    )


def weight_gradient(
    rows: torch.Tensor,  # [N, d] gradient of the concepts
    values: torch.Tensor,  # [B, T, k]
    indices: torch.Tensor,  # [B, T, k] int64 or int32
    std: torch.Tensor,  # [B, T, 1]
    dweight: torch.Tensor,  # [C, d]
) -> None:
    """dweight[c] = sum of values * std * rows over the pairs of concept c."""
    plan = plan_by_concept(indices.flatten(0, 1), dweight.shape[0])
    scatter_rows(plan, values.float() * std, rows, dweight)


def bias_gradient(
    rows: torch.Tensor,  # [N, d] gradient of the concepts
    std: torch.Tensor,  # [B, T, 1]
    dbias: torch.Tensor,  # [d]
) -> None:
    """dbias = sum over tokens of std * rows."""
    scatter_rows(plan_for_total(rows.shape[0], rows.device), std, rows, dbias[None])
