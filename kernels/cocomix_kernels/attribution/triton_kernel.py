"""Attribution in one kernel: k sampled dots a token, times the latents, and the largest positive products.

Shapes: N tokens, k active latents a token (at most 512), C latents, d width, K labels.

Memory bound: k rows of the decoder are read a token, and next to nothing is written. One warp takes a token, so that
its gradient row is read from memory once and nothing waits at a barrier; its k sort keys stay in registers, which
bounds k. Products are summed and compared in float32.
"""

# Triton's language has types of its own, which checkers take for something else.
# pyright: basic

import torch
import triton
import triton.language as tl

from cocomix_kernels.common.launch import ceil_div, launch, next_power_of_2
from cocomix_kernels.common.sparse_rows import dot_rows, row_dots, slice_width, with_contiguous_rows

_LOW = tl.constexpr(0x7FFFFFFF)
_INFINITY = tl.constexpr(0x7F800000)  # float32 bits; larger positive ones are NaN


@triton.jit
def _sort_keys(scores, concepts, inside):
    """int64 keys whose descending order is (score descending, concept ascending), NaN first; -1 if not positive."""
    bits = tl.where(scores != scores, _LOW, scores.to(tl.int32, bitcast=True))
    counts = inside & ((scores > 0) | (scores != scores))
    return tl.where(counts, (bits.to(tl.int64) << 32) | (_LOW - concepts.to(tl.int64)), -1)


@triton.jit
def _attribution_labels(
    values,
    indices,
    grad,
    decoder,
    labels,
    grad_stride,
    k,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    LABELS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)[:, None]
    dots = tl.zeros([GROUPS, ROWS], dtype=tl.float32)
    for start in range(0, k, ROWS):
        kept = start + tl.arange(0, ROWS)
        concepts = tl.load(indices + token * k + kept, mask=kept < k, other=0)
        part = row_dots(grad + token * grad_stride, concepts, decoder, D, BLOCK, ROWS)
        dots = tl.where(group * ROWS == start, part[None, :], dots)
    kept = group * ROWS + tl.arange(0, ROWS)[None, :]
    concepts = tl.load(indices + token * k + kept, mask=kept < k, other=0)
    latents = tl.load(values + token * k + kept, mask=kept < k, other=0.0).to(tl.float32)
    keys = tl.reshape(_sort_keys(latents * dots, concepts, kept < k), [GROUPS * ROWS])
    keys = tl.sort(keys, descending=True)
    positive = (keys >= 0) & ((keys >> 32) <= _INFINITY)
    rank = tl.arange(0, GROUPS * ROWS)
    tl.store(labels + token * LABELS + rank, tl.where(positive, _LOW - (keys & _LOW), -1), mask=rank < LABELS)


def attribution_labels(
    values: torch.Tensor,  # [N, k]
    indices: torch.Tensor,  # [N, k] int64 or int32
    grad: torch.Tensor,  # [N, d]
    decoder: torch.Tensor,  # [C, d]
    labels: torch.Tensor,  # [N, K] int64, holding -1 where K > k
) -> None:
    """The concepts of the K largest positive values * <decoder row, grad>, largest first, then -1."""
    (n, k), d = indices.shape, decoder.shape[1]
    rows, grad = dot_rows(k), with_contiguous_rows(grad)
    launch(
        _attribution_labels,
        (n,),
        values.contiguous(),
        indices.contiguous(),
        grad,
        decoder.contiguous(),
        labels,
        grad.stride(0),
        k,
        D=d,
        BLOCK=slice_width(d, decoder.itemsize),
        ROWS=rows,
        GROUPS=next_power_of_2(ceil_div(k, rows)),
        LABELS=labels.shape[1],
        num_warps=1,
        num_stages=1,
    )
