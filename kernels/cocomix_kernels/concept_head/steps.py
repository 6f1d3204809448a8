"""What `concept_head` and `topk_linear` share: the product a chunk at a time, and the steps on a chunk.

The steps on a chunk of logits exist twice under the same names: here for PyTorch, and in
`concept_head.triton_kernel`; `steps` chooses. R rows of a chunk, C concepts, k kept, K labels a row.
"""

import functools
from typing import NamedTuple

import torch

from cocomix_kernels.common.chunking import accumulation_dtype, row_chunks
from cocomix_kernels.common.selection import stable_topk


class Targets(NamedTuple):
    """Labels of some rows and what they weigh in the loss."""

    labels: torch.Tensor  # [R, K], -1 where there is none
    label_weights: torch.Tensor  # [R, K], 0 where there is none
    token_weights: torch.Tensor  # [R], the sum of a row's label weights

    def rows(self, rows: slice) -> "Targets":
        """The same for a slice of the rows."""
        return Targets(*(t[rows] for t in self))


_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TRITON_K, _TRITON_WIDTH = 256, 2**20  # sorting networks grow with k, and sort keys hold the index of a column


def backends(run, dtype, width, k) -> dict:
    """`run`, bound to each backend that takes C = `width` concepts of this dtype and k kept ones."""
    fits = dtype in _TRITON_DTYPES and k <= _TRITON_K and width <= _TRITON_WIDTH
    return {name: functools.partial(run, name) for name in ("torch", "triton") if fits or name == "torch"}


def steps(backend: str):
    """The module that holds `bytes_per_logit`, `topk`, `topk_and_loss` and `linear_gradients` of a backend."""
    if backend == "triton":
        from cocomix_kernels.concept_head import triton_kernel

        return triton_kernel
    from cocomix_kernels.concept_head import steps as torch_steps

    return torch_steps


def logit_chunks(x, weight, bias, backend):
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


def add_product_(total, left, right) -> None:
    """total += left @ right, where `total` may have a higher precision than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)
    else:
        total.add_(left @ right)


def bytes_per_logit(dtype: torch.dtype) -> int:
    """Room for a logit; where sums have a higher precision, for one copy in each."""
    wide = accumulation_dtype(dtype).itemsize
    return wide if dtype.itemsize == wide else wide + 2 * dtype.itemsize


def topk(logits, k, values, indices) -> None:
    """Write the k largest of each row, in order, to values [R, k] and indices [R, k]."""
    top, indices[:] = stable_topk(logits, k)
    values[:] = top


def topk_and_loss(logits, k, targets, values, indices, gradient_wanted):
    """`topk`, the weighted cross-entropy summed over the chunk, its gradient with respect to the logits and that
    gradient's column sums [C] (both None unless wanted). Overwrites logits where the dtype allows."""
    topk(logits, k, values, indices)
    top, labels = values[:, :1], targets.labels.long().clamp(min=0)
    label_logits = logits.gather(1, labels).to(values.dtype)
    p = logits.to(values.dtype).sub_(top).exp_()  # for float32 logits this is the buffer itself
    total = p.sum(1, keepdim=True)
    losses = targets.label_weights * (top + total.log() - label_logits)
    loss = torch.where(targets.label_weights > 0, losses, 0).sum()
    if not gradient_wanted:
        return loss, None, None
    p.mul_(targets.token_weights[:, None] / total).scatter_add_(1, labels, -targets.label_weights)
    return loss, p.to(logits.dtype), p.sum(0)


def linear_gradients(grad_values, indices, x, weight, of_loss, grad_loss, wanted):
    """Gradients (dx, dw, db) of a linear layer that is reached through k kept outputs a row and through a loss.

    grad_values [N, k] and `of_loss`, the loss's own (dx, dw, db), may each be None; grad_loss is a scalar tensor.
    `wanted` is a pair of flags for dx and for dw with db; an unwanted gradient comes out empty.
    """
    shapes, wanted = (x.shape, weight.shape, weight.shape[:1]), (wanted[0], wanted[1], wanted[1])
    dtype = accumulation_dtype(x.dtype)
    gradients = [
        None if not want else x.new_zeros(shape, dtype=dtype) if of_loss is None else of_loss[i].to(dtype) * grad_loss
        for i, (shape, want) in enumerate(zip(shapes, wanted, strict=True))
    ]
    if grad_values is not None:
        _add_sparse_gradients(grad_values, indices, x, weight, *gradients)
    return tuple(x.new_empty(0) if g is None else g.to(x.dtype) for g in gradients)


def _add_sparse_gradients(grad_values, indices, x, weight, dx, dw, db):  # never touches more than the kept rows
    n_kept, width = indices.shape[1], x.shape[1]
    for rows in row_chunks(x.shape[0], 2 * n_kept * width * accumulation_dtype(x.dtype).itemsize, x.device):
        g, kept = grad_values[rows], indices[rows]
        if dx is not None:
            dx[rows] += torch.bmm(g[:, None, :].to(dx.dtype), weight[kept].to(dx.dtype))[:, 0]
        if dw is not None:
            dw.index_add_(0, kept.flatten(), (g[:, :, None].to(dw.dtype) * x[rows, None, :]).flatten(0, 1))
            db.index_add_(0, kept.flatten(), g.flatten().to(db.dtype))
