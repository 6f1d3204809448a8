"""Exact TopK of wide rows and their log-sum-exp, reading each row once.

Shapes: R rows, C columns, k kept columns, G = ceil(C / group) groups of contiguous columns, K labels a row.

One warp takes one row (a few, where k or C are large). It streams the row, keeps the maximum of every group (and the
log-sum-exp), then looks at the k best groups only: ordered by (maximum descending, group ascending) these hold the k
best elements by (value descending, index ascending). For were one of those elements outside, each of the k groups
would hold an element that precedes it. Sort keys hold the order in one integer: the value's bits, made monotone,
above the complement of the index. bfloat16 values need 32 bits for both, others 64.

Many small blocks rather than few large ones: while one warp selects, which is latency, others stream.
"""

# Triton's language has types of its own, which checkers take for something else.
# pyright: basic

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cocomix_kernels.common.launch import ceil_div, launch, next_power_of_2

_TILE = 2048  # columns a warp reads at once: 64 a lane, eight 16-byte loads in flight for bfloat16
_KEYS_PER_WARP = {True: 1024, False: 512}  # narrow, wide: as many sort in registers without spilling
_NARROW_COLUMNS = 65536  # indices that fit beside a bfloat16 value in 32 bits


@triton.jit
def _ordered(x):
    """int32 whose order is that of the float32 x; -0 equals +0 and NaN is above everything."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _sort_keys(ordered, index, valid, NARROW: tl.constexpr):
    """Keys whose descending order is (value descending, index ascending); invalid entries come last."""
    if NARROW:
        keys = tl.where(valid, ((ordered >> 16) << 16) | (0xFFFF - index), -0x7FFFFFFF - 1)
    else:
        keys = (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))
        keys = tl.where(valid, keys, -0x7FFFFFFFFFFFFFFF - 1)
    return keys


@triton.jit
def _index_of(keys, NARROW: tl.constexpr):
    if NARROW:
        index = 0xFFFF - (keys & 0xFFFF)
    else:
        index = (0xFFFFFFFF - (keys & 0xFFFFFFFF)).to(tl.int32)
    return index


@triton.jit
def _value_of(keys, NARROW: tl.constexpr):
    if NARROW:
        upper = keys >> 16
        bits = tl.where(upper < 0, upper ^ 0x7FFF, upper) << 16
    else:
        upper = (keys >> 32).to(tl.int32)
        bits = tl.where(upper < 0, upper ^ 0x7FFFFFFF, upper)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _stream_row(logits, maxima, n_columns, n_groups, GROUP: tl.constexpr, TILE: tl.constexpr, STATISTICS: tl.constexpr):
    """Write the group maxima of one row and return its log-sum-exp, NaN where a logit is (0 without STATISTICS).

    A maximum skips NaN. The log-sum-exp shows it, so only without that is its group marked as one to look at.
    """
    log2_e: tl.constexpr = 1.4426950408889634  # pyright: ignore[reportAssignmentType]  Triton's own types
    top = -float("inf")  # of base-2 exponents, as is shift below
    total = 0.0
    result = 0.0
    for start in range(0, n_columns, TILE):
        columns = start + tl.arange(0, TILE)
        x = tl.load(logits + columns, mask=columns < n_columns, other=-float("inf")).to(tl.float32)
        number = x if STATISTICS else tl.where(x == x, x, float("inf"))
        best = tl.max(tl.reshape(number, [TILE // GROUP, GROUP]), axis=1)
        groups = start // GROUP + tl.arange(0, TILE // GROUP)
        tl.store(maxima + groups, best, mask=groups < n_groups)
        if STATISTICS:
            new_top = tl.maximum(top, tl.max(best, axis=0) * log2_e)
            shift = tl.where(new_top == -float("inf"), 0.0, new_top)  # nothing but -inf so far: exp2(-inf - 0) is 0
            total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(x * log2_e - shift), axis=0)
            top = new_top
    if STATISTICS:
        result = (top + tl.log2(total)) / log2_e
    return result


@triton.jit
def _row_topk_kernel(
    logits,  # [R, C]
    maxima,  # [R, G] float32, scratch
    labels,  # [R, K] int32
    label_weights,  # [R, K]
    values,  # [R, k] float32
    indices,  # [R, k] int64
    lse,  # [R]
    losses,  # [R]
    n_columns, n_groups, k, n_labels,
    GROUP: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, LABELS: tl.constexpr,
    NARROW: tl.constexpr, STATISTICS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * n_columns
    maxima += row * n_groups
    row_lse = _stream_row(logits, maxima, n_columns, n_groups, GROUP, TILE, STATISTICS)
    if STATISTICS:
        tl.store(lse + row, row_lse)
        label = tl.arange(0, LABELS)
        weight = tl.load(label_weights + row * n_labels + label, mask=label < n_labels, other=0.0)
        column = tl.load(labels + row * n_labels + label, mask=label < n_labels, other=0)
        x = tl.load(logits + column, mask=weight > 0, other=0.0).to(tl.float32)
        tl.store(losses + row, tl.sum(tl.where(weight > 0, weight * (row_lse - x), 0.0), axis=0))
    tl.debug_barrier()  # the maxima were written by other lanes
    group = tl.arange(0, GROUPS)
    best = _ordered(tl.load(maxima + group, mask=group < n_groups, other=0.0))
    best_groups = tl.topk(_sort_keys(best, group, group < n_groups, NARROW), KEPT)
    columns = _index_of(best_groups, NARROW)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    inside = (columns >= 0) & (columns < n_columns)  # an invalid key decodes to an index outside
    x = tl.load(logits + columns, mask=inside, other=0.0).to(tl.float32)
    keys = tl.reshape(_sort_keys(_ordered(x), columns, inside, NARROW), [KEPT * GROUP])
    best_keys = tl.topk(keys, KEPT)
    place = tl.arange(0, KEPT)
    tl.store(values + row * k + place, _value_of(best_keys, NARROW), mask=place < k)
    tl.store(indices + row * k + place, _index_of(best_keys, NARROW).to(tl.int64), mask=place < k)


def _group_width(n_columns: int, k: int) -> int:
    """The power of two at or below sqrt(C / k), where C / g maxima and k * g candidates are about as many."""
    return 1 << (math.isqrt(n_columns // k).bit_length() - 1)


def row_topk(
    logits: Tensor,
    k: int,
    values: Tensor,
    indices: Tensor,
    *,
    labels: Tensor | None = None,
    label_weights: Tensor | None = None,
    lse: Tensor | None = None,
    losses: Tensor | None = None,
) -> None:
    """Write the k largest entries of each row of logits [R, C], largest first, ties to the lowest index.

    values [R, k] float32, indices [R, k] int64, contiguous. With labels [R, K] int32 and label_weights [R, K] also
    lse [R], the log-sum-exp of each row, and losses [R], sum_j label_weights_j * (lse - logit of label_j) over
    positive weights; a NaN logit makes both NaN. Without labels it comes first, at latest after infinite ones.
    """
    n_rows, n_columns = logits.shape
    group = _group_width(n_columns, k)
    n_groups = ceil_div(n_columns, group)
    maxima = torch.empty(n_rows, n_groups, dtype=torch.float32, device=logits.device)
    statistics = labels is not None
    narrow = logits.dtype == torch.bfloat16 and n_columns <= _NARROW_COLUMNS
    n_labels = labels.shape[1] if statistics else 0
    groups, kept = (max(2, next_power_of_2(size)) for size in (n_groups, k))  # a network sorts two at least
    launch(
        _row_topk_kernel, (n_rows,), logits, maxima, labels, label_weights, values, indices, lse, losses,
        n_columns, n_groups, k, n_labels,
        GROUP=group, TILE=_TILE, GROUPS=groups, KEPT=kept,
        LABELS=next_power_of_2(max(n_labels, 1)),
        NARROW=narrow, STATISTICS=statistics,
        num_warps=max(1, min(8, max(groups, kept * group) // _KEYS_PER_WARP[narrow])),
    )  # fmt: skip
