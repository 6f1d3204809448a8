"""Loss of the language-model head without [N, V] logits: Liger-Kernel's on a GPU, else ours."""

# Liger-Kernel has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
from torch import Tensor

from cocomix_kernels.common.checks import check_device, check_integers, check_range, check_same, check_shapes
from cocomix_kernels.common.dispatch import choose_backend
from cocomix_kernels.lm_loss.head_losses import lm_head_losses


def _liger(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction  # pyright: ignore[reportMissingImports]  an optional library

    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels, None, None, ignore_index)
    return loss


def _torch_backend(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    if x.dtype in (torch.bfloat16, torch.float16) and x.is_cuda:
        try:
            return _liger(x, weight, labels, ignore_index)
        except ImportError:
            pass
    return lm_head_losses(x, weight, labels, ignore_index)[0]


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, backend: str | None = None
) -> Tensor:
    """Mean cross-entropy of the logits x W^T, over the labels that are not `ignore_index`.

    x [N, d], weight [V, d]: one floating dtype; labels [N] int64. Returns a scalar in float32 (float64 for float64
    inputs), NaN when every label is ignored. Gradients reach x and weight. Never holds more than a chunk of the
    logits. Raises `ValueError` for shapes, dtypes, devices or labels that do not fit.
    """
    check_shapes("linear_cross_entropy", x=(x, "N d"), weight=(weight, "V d"), labels=(labels, "N"))
    check_same("linear_cross_entropy", x=x, weight=weight)
    check_integers("linear_cross_entropy", labels=labels)
    check_device("linear_cross_entropy", x=x, labels=labels)
    labels = labels.long()
    counted = torch.where(labels == ignore_index, 0, labels)
    check_range("linear_cross_entropy", "labels", counted, 0, weight.shape[0])
    run = choose_backend("linear_cross_entropy", {"torch": _torch_backend}, backend, x.device)
    return run(x, weight, labels, ignore_index)
