"""Knowledge distillation, the baseline: next-token loss plus a KL term against a frozen teacher, without [N, V] logits.

Shapes: N tokens, d width of the student, d_t of the teacher, V tokens of the student's vocabulary, V_t rows of the
teacher's head, J tokens kept of the teacher's distribution.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cocomix_kernels.common.checks import (
    check_device,
    check_floats,
    check_integers,
    check_k,
    check_range,
    check_same,
    check_shapes,
)
from cocomix_kernels.common.chunking import accumulation_dtype, row_chunks
from cocomix_kernels.common.dispatch import choose_backend
from cocomix_kernels.common.products import write_product
from cocomix_kernels.lm_loss.head_losses import lm_head_losses, widened

_NAME = "linear_distillation"


def _without_last(windows: Tensor) -> Tensor:
    # [B, T, ...] -> [B (T - 1), ...]: the last token of a window predicts nothing
    return windows[:, :-1].flatten(0, 1)


class FullTargets(NamedTuple):
    """The teacher's whole distribution, which is never held: the softmax of hidden @ weight[:V].T."""

    hidden: Tensor  # [N, d_t] what the teacher's head multiplies
    weight: Tensor  # [V_t, d_t], V_t >= V; rows from V on are padding and get no probability

    def of_predictions(self) -> "FullTargets":
        """Of hidden [B, T, d_t], what the first T - 1 tokens of each window predict, [B (T - 1), d_t]."""
        return FullTargets(_without_last(self.hidden), self.weight)


class TopTargets(NamedTuple):
    """The teacher's J most probable tokens; all others count as one more token, which has the rest of the mass."""

    ids: Tensor  # [N, J] integers below V, distinct in a row
    log_probs: Tensor  # [N, J] floating: log-probabilities under the whole distribution

    def of_predictions(self) -> "TopTargets":
        """Of ids and log_probs [B, T, J], what the first T - 1 tokens of each window predict, [B (T - 1), J]."""
        return TopTargets(_without_last(self.ids), _without_last(self.log_probs))


class DistillationLoss(NamedTuple):
    """What `linear_distillation` returns: scalars, of which only `loss` carries gradients."""

    loss: Tensor  # ntp_loss + distillation_weight * kl
    ntp_loss: Tensor  # mean next-token cross-entropy, nats
    kl: Tensor  # mean KL(teacher || student), nats


def _torch_backend(
    x: Tensor, weight: Tensor, labels: Tensor, targets: FullTargets | TopTargets, kl_weight: float, ignore_index: int
) -> DistillationLoss:
    full = isinstance(targets, FullTargets)
    return DistillationLoss(*lm_head_losses(x, weight, labels, ignore_index, (targets[0], targets[1]), full, kl_weight))


@torch.no_grad()
def top_targets(hidden: Tensor, weight: Tensor, k: int) -> TopTargets:
    """The k largest of the softmax of hidden @ weight.T, largest first: what `TopTargets` keeps of a teacher.

    hidden [N, d_t], weight [V, d_t]: one floating dtype. Logits are products in that dtype, summed and kept in float32
    (float64 for float64 inputs), a chunk of rows at a time: large ones differ by less than bfloat16 can tell. Returns
    ids int64 and log_probs in float32 (float64), both [N, k]. Raises `ValueError` for shapes and dtypes that do not
    fit.
    """
    check_shapes("top_targets", hidden=(hidden, "N d_t"), weight=(weight, "V d_t"))
    check_same("top_targets", hidden=hidden, weight=weight)
    check_k("top_targets", k, weight.shape[0])
    hidden, weight, dtype = widened(hidden), widened(weight), accumulation_dtype(hidden.dtype)
    ids = hidden.new_empty(len(hidden), k, dtype=torch.int64)
    log_probs = hidden.new_empty(len(hidden), k, dtype=dtype)
    for rows in row_chunks(len(hidden), 2 * dtype.itemsize * len(weight), hidden.device):
        logits = hidden.new_empty(len(hidden[rows]), len(weight), dtype=dtype)
        write_product(logits, hidden[rows], weight.t())
        log_probs[rows], ids[rows] = logits.log_softmax(1).topk(k)
    return TopTargets(ids, log_probs)


def _check_targets(x: Tensor, weight: Tensor, counted: Tensor, targets: object) -> None:
    if isinstance(targets, FullTargets):
        names = {"targets.hidden": targets.hidden, "targets.weight": targets.weight}
        sizes = check_shapes(
            _NAME,
            x=(x, "N d"),
            **{name: (t, letters) for (name, t), letters in zip(names.items(), ("N d_t", "V_t d_t"), strict=True)},
        )
        check_same(_NAME, **names)
        if sizes["V_t"] < weight.shape[0]:
            raise ValueError(
                f"{_NAME}: targets.weight has {sizes['V_t']} rows, expected at least the {weight.shape[0]} of weight"
            )
    elif isinstance(targets, TopTargets):
        names = {"targets.ids": targets.ids, "targets.log_probs": targets.log_probs}
        sizes = check_shapes(_NAME, x=(x, "N d"), **{name: (t, "N J") for name, t in names.items()})
        check_integers(_NAME, **{"targets.ids": targets.ids})
        check_floats(_NAME, **{"targets.log_probs": targets.log_probs})
        check_k(_NAME, sizes["J"], weight.shape[0], "J, the width of targets.ids,")
    else:
        raise ValueError(f"{_NAME}: targets is a {type(targets).__name__}, expected FullTargets or TopTargets")
    check_device(_NAME, x=x, **names)
    if isinstance(targets, TopTargets):
        ids = torch.where(counted[:, None], targets.ids, 0)
        check_range(_NAME, "targets.ids", ids, 0, weight.shape[0])


def linear_distillation(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: FullTargets | TopTargets,
    distillation_weight: float,
    *,
    ignore_index: int = -100,
    backend: str | None = None,
) -> DistillationLoss:
    """Mean cross-entropy of the logits x W^T plus `distillation_weight` times the mean KL(teacher || student).

    x [N, d], weight [V, d]: the student's hidden states and head, one floating dtype; labels [N] integers. Means run
    over the labels that are not `ignore_index`; the other rows reach neither a loss nor a gradient, whatever their
    targets hold. The temperature is 1. Returns scalars in float32 (float64 for float64 inputs), NaN when every label
    is ignored. Gradients reach x and weight through `loss`; targets are constants, also where they require gradients.

    With `FullTargets`, in a floating dtype of their own, the KL is over all V tokens. With `TopTargets` it is that of
    the distributions over the J tokens and "any other": sum p (log p - log q) over the J, plus r_p (log r_p - log r_q)
    with r = 1 - sum, 0 log 0 = 0. Merging tokens never makes it larger (data processing inequality), and at J = V it
    is the whole KL. Rounded log-probabilities leave r_p as inexact as their sum. A CPU refuses ids out of range;
    that they are distinct is not checked.

    Never holds more than a chunk of the logits. Raises `ValueError` for shapes, dtypes, devices, labels, ids or a
    weight of the distillation that do not fit. Source: Hinton et al. (arXiv 1503.02531); CoCoMix (arXiv 2502.08524)
    compares itself with it.
    """
    check_shapes(_NAME, x=(x, "N d"), weight=(weight, "V d"), labels=(labels, "N"))
    check_same(_NAME, x=x, weight=weight)
    check_integers(_NAME, labels=labels)
    check_device(_NAME, x=x, labels=labels)
    labels = labels.long()
    counted = labels != ignore_index
    check_range(_NAME, "labels", torch.where(counted, labels, 0), 0, weight.shape[0])
    _check_targets(x, weight, counted, targets)
    if not 0 <= distillation_weight < math.inf:
        raise ValueError(f"{_NAME}: distillation_weight is {distillation_weight}, expected a finite number, 0 or more")
    run = choose_backend(_NAME, {"torch": _torch_backend}, backend, x.device)
    return run(x, weight, labels, targets, float(distillation_weight), ignore_index)
