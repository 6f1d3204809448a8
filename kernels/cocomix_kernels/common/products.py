"""Matrix products into buffers of another precision than the factors'."""

import torch
from torch import Tensor

from cocomix_kernels.common.chunking import accumulation_dtype


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, where `total` may have a higher precision than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.add_(left @ right)


def write_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """out = left @ right, where `out` may have another precision than the factors."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    elif left.is_cuda and out.dtype == accumulation_dtype(left.dtype):
        torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    else:
        out.copy_(left @ right)
