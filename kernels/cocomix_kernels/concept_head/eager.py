"""The steps of `concept_head` and `topk_linear` on a chunk of logits, in PyTorch.

R rows of a chunk, C concepts, k kept, K labels a row.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cocomix_kernels.common.chunking import accumulation_dtype, row_chunks
from cocomix_kernels.common.selection import stable_topk


class Targets(NamedTuple):
    """Labels of some rows and what they weigh in the loss."""

    labels: Tensor  # [R, K], -1 where there is none
    label_weights: Tensor  # [R, K], 0 where there is none
    token_weights: Tensor  # [R], the sum of a row's label weights

    def rows(self, rows: slice) -> "Targets":
        """The same for a slice of the rows."""
        return Targets(*(t[rows] for t in self))


class TorchSteps:
    """What happens to a chunk of logits between the library's products."""

    def bytes_per_logit(self, dtype: torch.dtype) -> float:
        """Room for a logit; where sums have a higher precision, for one copy in each."""
        wide = accumulation_dtype(dtype).itemsize
        return wide if dtype.itemsize == wide else wide + 2 * dtype.itemsize

    def topk(self, logits: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
        """Write the k largest of each row, in order, to values [R, k] and indices [R, k]."""
        if not logits.is_cuda:
            logits = logits.to(values.dtype)  # a CPU takes maxima of bfloat16 ten times as slowly
        top, indices[:] = stable_topk(logits, k)
        values[:] = top

    def topk_and_loss(
        self, logits: Tensor, k: int, targets: Targets, values: Tensor, indices: Tensor, gradient_wanted: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """`topk`, the weighted cross-entropy summed over the chunk, its gradient with respect to the logits and that
        gradient's column sums [C] (both None unless wanted). Overwrites logits where the dtype allows."""
        wide = logits.to(values.dtype)  # for float32 logits this is the buffer itself
        self.topk(wide, k, values, indices)
        top, labels = values[:, :1], targets.labels.long().clamp(min=0)
        label_logits = wide.gather(1, labels)
        p = wide.sub_(top).exp_()
        total = p.sum(1, keepdim=True)
        losses = targets.label_weights * (top + total.log() - label_logits)
        loss = torch.where(targets.label_weights > 0, losses, 0).sum()
        if not gradient_wanted:
            return loss, None, None
        p.mul_(targets.token_weights[:, None] / total).scatter_add_(1, labels, -targets.label_weights)
        return loss, logits.copy_(p) if p.dtype != logits.dtype else p, p.sum(0)

    def linear_gradients(
        self,
        grad_values: Tensor | None,
        indices: Tensor,
        x: Tensor,
        weight: Tensor,
        of_loss: tuple[Tensor, Tensor, Tensor] | None,
        grad_loss: Tensor | None,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients (dx, dw, db) of a linear layer that is reached through k kept outputs a row and through a loss.

        grad_values [N, k] and `of_loss`, the loss's own (dx, dw, db), may each be None; grad_loss is a scalar tensor.
        `wanted` is a pair of flags for dx and for dw with db; an unwanted gradient comes out empty.
        """
        dx_wanted, dw_wanted = wanted
        dtype = accumulation_dtype(x.dtype)
        parts = zip(
            (x, weight, weight[:, 0]), (dx_wanted, dw_wanted, dw_wanted), of_loss or (None, None, None), strict=True
        )
        gradients = [
            _share_of_loss(like, of_this, grad_loss, dtype) if is_wanted else None for like, is_wanted, of_this in parts
        ]
        if grad_values is not None:
            _add_sparse_gradients(grad_values, indices, x, weight, *gradients)
        dx, dw, db = (x.new_empty(0) if g is None else g.to(x.dtype) for g in gradients)
        return dx, dw, db


def _share_of_loss(like: Tensor, of_loss: Tensor | None, grad_loss: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What comes into a gradient through the loss: zeros where there was none."""
    if of_loss is None or grad_loss is None:
        return like.new_zeros(like.shape, dtype=dtype)
    return of_loss.to(dtype) * grad_loss


def _add_sparse_gradients(
    grad_values: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    dx: Tensor | None,
    dw: Tensor | None,
    db: Tensor | None,
) -> None:
    # never touches more than the kept rows
    n_kept, width = indices.shape[1], x.shape[1]
    for rows in row_chunks(x.shape[0], 2 * n_kept * width * accumulation_dtype(x.dtype).itemsize, x.device):
        g, kept = grad_values[rows], indices[rows]
        if dx is not None:
            dx[rows] += torch.bmm(g[:, None, :].to(dx.dtype), weight[kept].to(dx.dtype))[:, 0]
        if dw is not None and db is not None:
            dw.index_add_(0, kept.flatten(), (g[:, :, None].to(dw.dtype) * x[rows, None, :]).flatten(0, 1))
            db.index_add_(0, kept.flatten(), g.flatten().to(db.dtype))
