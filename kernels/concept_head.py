"""Linear layer + exact TopK + multi-label cross-entropy over C concepts, without [N, C] logits.

Shapes: N tokens, d width, C concepts, k kept concepts, K labels a token.

The logits exist a chunk of rows at a time. While a chunk is at hand, the gradient of the cross-entropy is taken from
it and multiplied into dx and dW at once, so that forward and backward together do three products of N*C*d and never
a fourth; the backward pass scales those and adds the gradient through the k kept values, which is sparse.
"""

from typing import NamedTuple

import torch

from cocomix.kernels.checks import check_device, check_integers, check_k, check_range, check_same, check_shapes
from cocomix.kernels.chunking import accumulation_dtype
from cocomix.kernels.dispatch import choose_backend
from cocomix.kernels.linear_topk import logit_chunks, sparse_linear_gradients
from cocomix.kernels.selection import stable_topk


class ConceptHead(NamedTuple):
    """What `concept_head` returns."""

    values: torch.Tensor  # [N, k] kept logits, descending
    indices: torch.Tensor  # [N, k] int64
    loss: torch.Tensor | None  # scalar, None without labels


def _label_weights(labels, dtype):
    """Weight of each label in the loss [N, K] (0 where there is none) and of each token [N]."""
    valid = labels >= 0
    count = valid.sum(1)
    per_token = (count > 0).to(dtype)
    per_token = per_token / per_token.sum().clamp(min=1)
    return valid * (per_token / count.clamp(min=1))[:, None], per_token


def _cross_entropy(logits, top, labels, label_weights):
    """Loss of a chunk, and exp(logits - max) with its row sums; overwrites logits where the dtype allows."""
    label_logits = logits.gather(1, labels).to(top.dtype)
    p = logits.to(top.dtype).sub_(top).exp_()  # for float32 logits this is the buffer itself
    total = p.sum(1, keepdim=True)
    losses = label_weights * (top + total.log() - label_logits)
    return torch.where(label_weights > 0, losses, 0).sum(), p, total


@torch.library.custom_op("cocomix::concept_head", mutates_args=())
def _concept_head(
    x: torch.Tensor,  # [N, d]
    weight: torch.Tensor,  # [C, d]
    bias: torch.Tensor,  # [C]
    labels: torch.Tensor | None,  # [N, K]
    k: int,
    dx_wanted: bool,
    dw_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    values, indices, loss, dx, dw, db = _outputs(x, weight, bias, labels, k, dx_wanted, dw_wanted)
    loss.zero_(), dw.zero_(), db.zero_()
    if labels is not None:
        label_weights, token_weights = _label_weights(labels, values.dtype)
        labels = labels.long().clamp(min=0)
    for rows, logits in logit_chunks(x, weight, bias):
        top, indices[rows] = stable_topk(logits, k)
        values[rows] = top
        if labels is None:
            continue
        part, p, total = _cross_entropy(logits, values[rows, :1], labels[rows], label_weights[rows])
        loss += part
        if not (dx_wanted or dw_wanted):
            continue
        p.mul_(token_weights[rows, None] / total).scatter_add_(1, labels[rows], -label_weights[rows])
        if dw_wanted:
            db += p.sum(0)
        p = p.to(x.dtype)
        if dx_wanted:
            dx[rows] = p @ weight
        if dw_wanted:
            dw.addmm_(p.t(), x[rows]) if dw.dtype == p.dtype else dw.add_(p.t() @ x[rows])
    return values, indices, loss, dx, dw, db


@_concept_head.register_fake
def _outputs(x, weight, bias, labels, k, dx_wanted, dw_wanted):
    dtype = accumulation_dtype(x.dtype)
    (n, d), c = x.shape, weight.shape[0]
    dx_wanted, dw_wanted = (wanted and labels is not None for wanted in (dx_wanted, dw_wanted))
    return (
        x.new_empty(n, k, dtype=dtype),
        x.new_empty(n, k, dtype=torch.int64),
        x.new_empty((), dtype=dtype),
        x.new_empty(n if dx_wanted else 0, d, dtype=dtype),
        x.new_empty(c if dw_wanted else 0, d, dtype=dtype),
        x.new_empty(c if dw_wanted else 0, dtype=dtype),
    )


@torch.library.custom_op("cocomix::concept_head_backward", mutates_args=())
def _concept_head_backward(
    grad_values: torch.Tensor,  # [N, k]
    grad_loss: torch.Tensor,  # scalar
    indices: torch.Tensor,  # [N, k]
    x: torch.Tensor,
    weight: torch.Tensor,
    loss_dx: torch.Tensor,  # [N, d], or empty where there was no loss
    loss_dw: torch.Tensor,  # [C, d]
    loss_db: torch.Tensor,  # [C]
    dx_wanted: bool,
    dw_wanted: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    def scaled(of_loss, shape):
        return of_loss * grad_loss if len(of_loss) else loss_dx.new_zeros(shape)

    dx = scaled(loss_dx, x.shape) if dx_wanted else None
    dw = scaled(loss_dw, weight.shape) if dw_wanted else None
    db = scaled(loss_db, weight.shape[:1]) if dw_wanted else None
    sparse_linear_gradients(grad_values, indices, x, weight, dx, dw, db)
    nothing = x.new_empty(0)
    return tuple(nothing.clone() if g is None else g.to(x.dtype) for g in (dx, dw, db))


@_concept_head_backward.register_fake
def _(grad_values, grad_loss, indices, x, weight, loss_dx, loss_dw, loss_db, dx_wanted, dw_wanted):
    shapes = (x.shape if dx_wanted else (0,), *((weight.shape, weight.shape[:1]) if dw_wanted else ((0,), (0,))))
    return tuple(x.new_empty(shape) for shape in shapes)


def _setup_context(ctx, inputs, output):
    x, weight, bias, labels, k, dx_wanted, dw_wanted = inputs
    values, indices, loss, dx, dw, db = output
    ctx.mark_non_differentiable(indices, dx, dw, db)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices, x, weight, dx, dw, db)
    ctx.wanted = dx_wanted, dw_wanted


def _backward(ctx, grad_values, grad_indices, grad_loss, *_):
    indices, x, weight, dx, dw, db = ctx.saved_tensors
    if grad_values is None:
        grad_values = dx.new_zeros(indices.shape)
    if grad_loss is None:
        grad_loss = dx.new_zeros(())
    gradients = _concept_head_backward(grad_values, grad_loss, indices, x, weight, dx, dw, db, *ctx.wanted)
    wanted = (ctx.wanted[0], ctx.wanted[1], ctx.wanted[1])
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None, None


_concept_head.register_autograd(_backward, setup_context=_setup_context)


def _torch_backend(x, weight, bias, k, labels):
    grad = torch.is_grad_enabled()
    dx_wanted = grad and x.requires_grad
    dw_wanted = grad and (weight.requires_grad or bias.requires_grad)
    values, indices, loss, *_ = _concept_head(x, weight, bias, labels, k, dx_wanted, dw_wanted)
    return ConceptHead(values, indices, None if labels is None else loss)


def concept_head(x, weight, bias, k, labels=None, *, backend=None) -> ConceptHead:
    """Predict concepts: logits z = x W^T + b, their TopK, and the concept loss.

    x [N, d], weight [C, d], bias [C]: one floating dtype; labels [N, K] integers, -1 where there is none.
    Returns values [N, k] (descending; float32, float64 for float64 inputs), indices [N, k] int64 and the loss: the
    mean, over tokens with at least one label, of the mean cross-entropy of that token's labels (0 when no token has
    any; None without labels). The selection is exact on the logits as stored in x's dtype, ties go to the lowest
    index, and negative logits stay. Gradients reach x, weight and bias through values and loss.

    Source: CoCoMix (arXiv 2502.08524), section 3: concept prediction. Raises `ValueError` for shapes, dtypes,
    devices, k or labels that do not fit.
    """
    sizes = check_shapes("concept_head", x=(x, "N d"), weight=(weight, "C d"), bias=(bias, "C"))
    check_same("concept_head", x=x, weight=weight, bias=bias)
    check_k("concept_head", k, sizes["C"])
    if labels is not None:
        check_shapes("concept_head", x=(x, "N d"), labels=(labels, "N K"))
        check_integers("concept_head", labels=labels)
        check_device("concept_head", x=x, labels=labels)
        check_range("concept_head", "labels", labels, -1, sizes["C"])
    run = choose_backend("concept_head", {"torch": _torch_backend}, backend, x.device)
    return run(x, weight, bias, k, labels)
