"""Linear layer + exact TopK + multi-label cross-entropy over C concepts, without [N, C] logits.

Shapes: N tokens, d width, C concepts, k kept concepts, K labels a token.

The logits exist a chunk of rows at a time. While a chunk is at hand, the gradient of the cross-entropy is taken from
it and multiplied into dx and dW at once, so that forward and backward together do three products of N*C*d and never
a fourth; the backward pass scales those and adds the gradient through the k kept values, which is sparse. The
products are the library's; the steps between them are PyTorch's or Triton kernels.
"""

# torch.library has no types for what it decorates.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cocomix_kernels.common.checks import check_device, check_integers, check_k, check_range, check_same, check_shapes
from cocomix_kernels.common.chunking import accumulation_dtype
from cocomix_kernels.common.dispatch import choose_backend
from cocomix_kernels.common.products import add_product_
from cocomix_kernels.concept_head.eager import Targets
from cocomix_kernels.concept_head.steps import backends, logit_chunks, steps


class ConceptHead(NamedTuple):
    """What `concept_head` returns."""

    values: Tensor  # [N, k] kept logits, descending
    indices: Tensor  # [N, k] int64
    loss: Tensor | None  # scalar, None without labels


def _targets(labels: Tensor, dtype: torch.dtype) -> Targets:
    """What each label [N, K] and each token weighs in the mean over labelled tokens."""
    valid = labels >= 0
    count = valid.sum(1)
    per_token = (count > 0).to(dtype)
    per_token = per_token / per_token.sum().clamp(min=1)
    label_weights = valid * (per_token / count.clamp(min=1))[:, None]
    return Targets(labels.to(torch.int32).contiguous(), label_weights, per_token)


@torch.library.custom_op("cocomix::concept_head", mutates_args=())
def _concept_head(
    x: Tensor,  # [N, d]
    weight: Tensor,  # [C, d]
    bias: Tensor,  # [C]
    labels: Tensor | None,  # [N, K]
    k: int,
    dx_wanted: bool,
    dw_wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    values, indices, loss, dx, dw, db = _outputs(x, weight, bias, labels, k, dx_wanted, dw_wanted, backend)
    for total in (loss, dw, db):
        total.zero_()
    step = steps(backend)
    targets = None if labels is None else _targets(labels, values.dtype)
    for rows, logits in logit_chunks(x, weight, bias, backend):
        if targets is None:
            step.topk(logits, k, values[rows], indices[rows])
            continue
        part, gradient, column_sums = step.topk_and_loss(
            logits, k, targets.rows(rows), values[rows], indices[rows], dx_wanted or dw_wanted
        )
        loss += part
        if gradient is None:
            continue
        if dx_wanted:
            torch.mm(gradient, weight, out=dx[rows])
        if dw_wanted:
            add_product_(dw, gradient.t(), x[rows])
            db += column_sums
    return values, indices, loss, dx, dw, db


@_concept_head.register_fake
def _outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor | None,
    k: int,
    dx_wanted: bool,
    dw_wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    (n, d), c = x.shape, weight.shape[0]
    dx_wanted, dw_wanted = (wanted and labels is not None for wanted in (dx_wanted, dw_wanted))
    return (
        x.new_empty(n, k, dtype=dtype),
        x.new_empty(n, k, dtype=torch.int64),
        x.new_empty((), dtype=dtype),
        x.new_empty(n if dx_wanted else 0, d),
        x.new_empty(c if dw_wanted else 0, d, dtype=dtype),
        x.new_empty(c if dw_wanted else 0, dtype=dtype),
    )


@torch.library.custom_op("cocomix::concept_head_backward", mutates_args=())
def _concept_head_backward(
    grad_values: Tensor | None,  # [N, k]
    grad_loss: Tensor | None,  # scalar, None where there was no loss or nothing comes back through it
    indices: Tensor,  # [N, k]
    x: Tensor,
    weight: Tensor,
    loss_dx: Tensor,  # [N, d]
    loss_dw: Tensor,  # [C, d]
    loss_db: Tensor,  # [C]
    dx_wanted: bool,
    dw_wanted: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    of_loss = None if grad_loss is None else (loss_dx, loss_dw, loss_db)
    wanted = dx_wanted, dw_wanted
    return steps(backend).linear_gradients(grad_values, indices, x, weight, of_loss, grad_loss, wanted)


@_concept_head_backward.register_fake
def _(
    grad_values: Tensor | None,
    grad_loss: Tensor | None,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    loss_dx: Tensor,
    loss_dw: Tensor,
    loss_db: Tensor,
    dx_wanted: bool,
    dw_wanted: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    shapes = (x.shape if dx_wanted else (0,), *((weight.shape, weight.shape[:1]) if dw_wanted else ((0,), (0,))))
    return tuple(x.new_empty(shape) for shape in shapes)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, labels, _, dx_wanted, dw_wanted, backend = inputs
    _, indices, _, dx, dw, db = output
    ctx.mark_non_differentiable(indices, dx, dw, db)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(indices, x, weight, dx, dw, db)
    ctx.wanted, ctx.backend, ctx.has_loss = (dx_wanted, dw_wanted), backend, labels is not None


def _backward(
    ctx: Any, grad_values: Tensor | None, grad_indices: Tensor | None, grad_loss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if not ctx.has_loss:
        grad_loss = None
    gradients = _concept_head_backward(grad_values, grad_loss, *ctx.saved_tensors, *ctx.wanted, ctx.backend)
    wanted = (ctx.wanted[0], ctx.wanted[1], ctx.wanted[1])
    return *(g if w else None for g, w in zip(gradients, wanted, strict=True)), None, None, None, None, None


_concept_head.register_autograd(_backward, setup_context=_setup_context)


def _run(backend: str, x: Tensor, weight: Tensor, bias: Tensor, k: int, labels: Tensor | None) -> ConceptHead:
    grad = torch.is_grad_enabled()
    dx_wanted = grad and x.requires_grad
    dw_wanted = grad and (weight.requires_grad or bias.requires_grad)
    values, indices, loss, *_ = _concept_head(x, weight, bias, labels, k, dx_wanted, dw_wanted, backend)
    return ConceptHead(values, indices, None if labels is None else loss)


def concept_head(
    x: Tensor, weight: Tensor, bias: Tensor, k: int, labels: Tensor | None = None, *, backend: str | None = None
) -> ConceptHead:
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
    run = choose_backend("concept_head", backends(_run, x.dtype, sizes["C"], k), backend, x.device)
    return run(x, weight, bias, k, labels)
