"""Loss of the language-model head without [N, V] logits: a choice among libraries."""

# Liger-Kernel, torch's checkpoint and Tensor.split have no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cocomix_kernels.common.checks import check_device, check_integers, check_range, check_same, check_shapes
from cocomix_kernels.common.chunking import accumulation_dtype, chunk_rows
from cocomix_kernels.common.dispatch import choose_backend

_CPU_ROWS = 128  # as fast as 256 at V = 50257, d = 512; PyTorch's own choice takes three times as long


def _pytorch(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """PyTorch 2.13 and later. It sums the chunks' losses and gradients in the inputs' dtype, hence the casts."""
    x, weight = (t.to(accumulation_dtype(t.dtype)) for t in (x, weight))
    rows = _CPU_ROWS if x.device.type == "cpu" else chunk_rows(len(x), 4 * weight.shape[0], x.device)
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=min(rows, max(len(x), 1)),
        chunking_method=None,
        acc_policy="accurate",
        allow_retain_graph=True,
    )
    return F.linear_cross_entropy(x, weight, labels, ignore_index=ignore_index, options=options)


def _liger(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction  # pyright: ignore[reportMissingImports]  an optional library

    loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels, None, None, ignore_index)
    return loss


def _recomputed(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Chunks whose logits are computed again in the backward pass: a fourth product, but no library needed."""
    total = torch.zeros((), dtype=accumulation_dtype(x.dtype), device=x.device)
    wide_weight = weight.to(total.dtype)  # so that the chunks' gradients add up in this dtype

    def chunk_loss(part: Tensor, part_labels: Tensor) -> Tensor:
        logits = (part @ wide_weight.to(part.dtype).t()).to(total.dtype)
        return F.cross_entropy(logits, part_labels, ignore_index=ignore_index, reduction="sum")

    rows = chunk_rows(len(x), 8 * weight.shape[0], x.device)
    for part, part_labels in zip(x.split(rows), labels.split(rows), strict=True):
        total = total + checkpoint(chunk_loss, part, part_labels, use_reentrant=False)
    return total / (labels != ignore_index).sum()


def _torch_backend(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    in_full_precision = x.device.type == "cpu" or x.dtype == accumulation_dtype(x.dtype)
    if hasattr(F, "linear_cross_entropy") and in_full_precision:  # a CPU multiplies in float32 in any case
        return _pytorch(x, weight, labels, ignore_index)
    if x.device.type == "cuda":
        try:
            return _liger(x, weight, labels, ignore_index)
        except ImportError:
            pass
    return _recomputed(x, weight, labels, ignore_index)


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
