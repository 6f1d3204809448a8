"""The gradient of the multi-label cross-entropy, in place over a chunk of logits, with its column sums.

Shapes: R rows, C columns, K labels a row.

One read and one write of the chunk, which is what bounds it: the column sums (the bias gradient) and the labels come
along in registers. A block takes a strip of columns down some hundreds of rows and writes its sums to a row of a
small buffer, so that they are added in one order, whatever the schedule.
"""

# Triton's language has types of its own, which checkers take for something else.
# pyright: basic

import torch
import triton
import triton.language as tl
from torch import Tensor

from cocomix_kernels.common.launch import ceil_div, launch

_ROWS_PER_BLOCK = 256  # the buffer of column sums then has 1/128 of a bfloat16 chunk's bytes
_TILE_ROWS, _TILE_COLUMNS = 8, 256  # 512 contiguous bytes a row; 16 elements a thread leave room for 28 warps


@triton.jit
def _gradient_kernel(
    logits,  # [R, C], becomes the gradient
    lse,  # [R]
    token_weights,  # [R]
    labels,  # [R, K] int32, negative where there is none
    label_weights,  # [R, K]
    column_sums,  # [ceil(R / ROWS), C] float32
    n_rows, n_columns,
    LABELS: tl.constexpr, ROWS: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    log2_e: tl.constexpr = 1.4426950408889634  # pyright: ignore[reportAssignmentType]  Triton's own types
    columns = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    block = tl.program_id(1)
    total = tl.zeros([TILE_ROWS, TILE_COLUMNS], tl.float32)  # summed over rows once, at the end
    for start in range(0, tl.minimum(ROWS, n_rows - block * ROWS), TILE_ROWS):
        rows = block * ROWS + start + tl.arange(0, TILE_ROWS)
        present = rows < n_rows
        inside = present[:, None] & (columns < n_columns)[None, :]
        places = logits + rows.to(tl.int64)[:, None] * n_columns + columns[None, :]
        x = tl.load(places, mask=inside, other=-float("inf")).to(tl.float32)
        shift = tl.load(lse + rows, mask=present, other=0.0)[:, None] * log2_e
        weight = tl.load(token_weights + rows, mask=present, other=0.0)[:, None]
        gradient = tl.exp2(x * log2_e - shift) * weight
        for j in tl.static_range(LABELS):
            label = tl.load(labels + rows * LABELS + j, mask=present, other=-1)[:, None]
            label_weight = tl.load(label_weights + rows * LABELS + j, mask=present, other=0.0)[:, None]
            gradient -= tl.where(columns[None, :] == label, label_weight, 0.0)
        tl.store(places, gradient.to(logits.dtype.element_ty), mask=inside)
        total += gradient
    tl.store(column_sums + block.to(tl.int64) * n_columns + columns, tl.sum(total, axis=0), mask=columns < n_columns)


def cross_entropy_gradient_(
    logits: Tensor, lse: Tensor, token_weights: Tensor, labels: Tensor, label_weights: Tensor
) -> Tensor:
    """Overwrite logits [R, C] with token_weights * softmax(logits) - sum_j label_weights_j * onehot(label_j).

    lse [R] is the rows' log-sum-exp, token_weights [R] and label_weights [R, K] are float32, labels [R, K] int32
    (negative where there is none). Returns the column sums [C] float32, taken before rounding to logits' dtype.
    """
    n_rows, n_columns = logits.shape
    n_blocks = ceil_div(n_rows, _ROWS_PER_BLOCK)
    column_sums = torch.empty(n_blocks, n_columns, dtype=torch.float32, device=logits.device)
    launch(
        _gradient_kernel, (ceil_div(n_columns, _TILE_COLUMNS), n_blocks),
        logits, lse, token_weights, labels, label_weights, column_sums, n_rows, n_columns,
        LABELS=labels.shape[1], ROWS=_ROWS_PER_BLOCK, TILE_ROWS=_TILE_ROWS, TILE_COLUMNS=_TILE_COLUMNS,
        num_warps=4,
    )  # fmt: skip
    return column_sums.sum(0)
