"""What `concept_head` and `topk_linear` share: the backends that take their shapes, and the product by chunks."""

import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from cocomix_kernels.common.chunking import row_chunks
from cocomix_kernels.concept_head.eager import TorchSteps

R = TypeVar("R")

_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TRITON_K, _TRITON_WIDTH = 256, 2**20  # sorting networks grow with k, and sort keys hold the index of a column


def backends(run: Callable[..., R], dtype: torch.dtype, width: int, k: int) -> dict[str, Callable[..., R]]:
    """`run`, bound to each backend that takes C = `width` concepts of this dtype and k kept ones."""
    fits = dtype in _TRITON_DTYPES and k <= _TRITON_K and width <= _TRITON_WIDTH
    return {name: functools.partial(run, name) for name in ("torch", "triton") if fits or name == "torch"}


def steps(backend: str) -> TorchSteps:
    """The steps on a chunk of logits as a backend takes them."""
    if backend == "triton":
        from cocomix_kernels.concept_head.triton_kernel import TritonSteps

        return TritonSteps()
    return TorchSteps()


def logit_chunks(x: Tensor, weight: Tensor, bias: Tensor, backend: str) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits) for x [N, d], weight [C, d], bias [C]: logits [R, C] in x's dtype, in a reused buffer.

    A consumer may overwrite the logits.
    """
    bytes_per_row = weight.shape[0] * steps(backend).bytes_per_logit(x.dtype)
    chunks = row_chunks(x.shape[0], int(bytes_per_row), x.device, backend)
    buffer = x.new_empty(chunks[0].stop if chunks else 0, weight.shape[0])
    for rows in chunks:
        logits = buffer[: rows.stop - rows.start]
        torch.addmm(bias, x[rows], weight.t(), out=logits)
        yield rows, logits
