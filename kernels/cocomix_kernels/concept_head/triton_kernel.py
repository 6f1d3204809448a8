"""The steps of `concept_head` and `topk_linear` on a chunk of logits, as Triton kernels."""

import torch
from torch import Tensor

from cocomix_kernels.common.sparse_rows import plan_by_concept, scatter_rows, weighted_rows
from cocomix_kernels.concept_head.eager import Targets, TorchSteps
from cocomix_kernels.concept_head.triton_cross_entropy import cross_entropy_gradient_
from cocomix_kernels.concept_head.triton_selection import row_topk


class TritonSteps(TorchSteps):
    """The steps of `TorchSteps`, each in one kernel or two."""

    def bytes_per_logit(self, dtype: torch.dtype) -> float:
        """A logit, whose place its gradient takes, and its share of group maxima and column sums (an eighth each)."""
        return dtype.itemsize + 0.25

    def topk(self, logits: Tensor, k: int, values: Tensor, indices: Tensor) -> None:
        """Write the k largest of each row, in order, to values [R, k] and indices [R, k]."""
        row_topk(logits, k, values, indices)

    def topk_and_loss(
        self, logits: Tensor, k: int, targets: Targets, values: Tensor, indices: Tensor, gradient_wanted: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As in PyTorch's form; the gradient overwrites the logits."""
        lse, losses = (values.new_empty(len(logits)) for _ in range(2))
        row_topk(
            logits,
            k,
            values,
            indices,
            labels=targets.labels,
            label_weights=targets.label_weights,
            lse=lse,
            losses=losses,
        )
        if not gradient_wanted:
            return losses.sum(), None, None
        column_sums = cross_entropy_gradient_(logits, lse, targets.token_weights, targets.labels, targets.label_weights)
        return losses.sum(), logits, column_sums

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
        """As in PyTorch's form: the loss's gradient is scaled, added to and rounded in the pass that writes the sum."""
        if grad_values is None:
            return super().linear_gradients(None, indices, x, weight, of_loss, grad_loss, wanted)
        of_dx, of_dw, of_db = (None, None, None) if of_loss is None else of_loss
        dx, dw, db = (x.new_empty(0) for _ in range(3))
        if wanted[0]:
            dx = torch.empty_like(x)
            weighted_rows(grad_values, indices, weight, dx, base=of_dx, scale=grad_loss)
        if wanted[1]:
            dw, db = torch.empty_like(weight), weight.new_empty(len(weight))
            plan = plan_by_concept(indices, len(weight))
            scatter_rows(plan, grad_values, x, dw, db, base=of_dw, base_sums=of_db, scale=grad_loss)
        return dx, dw, db
