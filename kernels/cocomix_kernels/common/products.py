"""Matrix products into buffers of another precision than the factors'."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cocomix_kernels.common.chunking import accumulation_dtype

# A CPU's products come out in their factors' dtype. They are taken a block at a time, small enough to be widened and
# added while it is in the cache: twice as fast as whole, for heads of 33k to 50k rows and chunks of 128 to 512 tokens.
_BLOCK_ELEMENTS = 2**20


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where `total` may have a higher precision than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        for rows in _blocks(*total.shape):
            total[rows].add_((left[rows] @ right).to(total.dtype))


def write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, where `out` may have another precision than the factors."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda and out.dtype == accumulation_dtype(left.dtype):
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    else:
        for columns in _blocks(out.shape[1], out.shape[0]):
            out[:, columns].copy_(left @ right[:, columns])


def scaled(matrix: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """matrix * factor, a scalar, multiplied in the matrix's precision and rounded to `dtype`."""
    if matrix.is_cuda or matrix.dtype == dtype:
        return (matrix * factor).to(dtype)
    out = torch.empty_like(matrix, dtype=dtype)
    for rows in _blocks(*matrix.shape):
        out[rows] = matrix[rows] * factor
    return out


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Slices of n rows, or columns, that have `width` elements each."""
    step = max(1, _BLOCK_ELEMENTS // max(1, width))
    for start in range(0, n, step):
        yield slice(start, start + step)
