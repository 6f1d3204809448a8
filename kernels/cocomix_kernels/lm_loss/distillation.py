"""Knowledge distillation, the baseline: next-token loss plus a KL term against a frozen teacher, without [N, V] logits.

Shapes: N tokens, d width of the student, d_t of the teacher, V tokens of the student's vocabulary, V_t rows of the
teacher's head, J tokens kept of the teacher's distribution; R rows of a chunk.

Student's logits z (softmax q) exist a chunk of rows at a time, and the teacher's beside them where its whole
distribution p is asked for. While a chunk is at hand, the gradient of both losses is taken from it and multiplied into
dx and dW at once, as Liger-Kernel's fused linear cross-entropy does (arXiv 2410.10989); the backward pass only scales
those. So forward and backward do three products of N*V*d, and the teacher's N*V*d_t. There is no Triton kernel: this
operation is for comparison, the products are the library's, and on a CPU they take most of the time.
"""

# torch.library has no types for what it decorates.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
from typing import Any, NamedTuple

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
from cocomix_kernels.common.products import add_product_, write_product

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


class _Rows(NamedTuple):
    """What both kinds of targets need of a chunk beside its logits."""

    labels: Tensor  # [R, 1] int64, 0 where ignored
    ignored: Tensor  # [R, 1] bool
    kl_weight: float
    gradient_wanted: bool


def _widened(matrix: Tensor) -> Tensor:
    """The matrix as its products read it: a CPU multiplies in float32 in any case."""
    return matrix if matrix.is_cuda else matrix.to(accumulation_dtype(matrix.dtype))


def _full_step(buffers: list[Tensor], hidden: Tensor, teacher_weight: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Losses of a chunk [R, 1] each, against the teacher's whole distribution; hidden [R, d_t].

    The first of three buffers [R, V] comes with the student's logits and leaves with their gradient, unless unwanted.
    """
    first, log_q, log_p = buffers
    torch.log_softmax(first, 1, out=log_q)
    ntp = -log_q.gather(1, rows.labels)
    write_product(first, _widened(hidden).masked_fill(rows.ignored, 0), teacher_weight.t())
    torch.log_softmax(first, 1, out=log_p)
    p = torch.exp(log_p, out=first)
    kl = log_p.sub_(log_q).mul_(p).sum(1, keepdim=True)
    if rows.gradient_wanted:
        counted = (~rows.ignored).to(p.dtype)
        q = log_q.exp_().mul_((1 + rows.kl_weight) * counted)
        torch.addcmul(q, p, counted, value=-rows.kl_weight, out=first).scatter_add_(1, rows.labels, -counted)
    return ntp, kl


def _top_step(buffers: list[Tensor], ids: Tensor, log_probs: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """`_full_step` with one buffer, against J kept tokens; ids and log_probs [R, J]."""
    (logits,) = buffers
    ids = ids.long().masked_fill(rows.ignored, 0)
    log_p = log_probs.to(logits.dtype)
    label_logits, kept_logits = logits.gather(1, rows.labels), logits.gather(1, ids)
    top = logits.scatter_(1, ids, -torch.inf).amax(1, keepdim=True)  # of the other tokens
    top.masked_fill_(top == -torch.inf, 0)  # there are none
    others = logits.sub_(top).exp_()  # e^(z - top), 0 at the kept tokens
    total = others.sum(1, keepdim=True)
    log_q = torch.cat([kept_logits, top + total.log()], 1)  # [R, J + 1], the last for all others
    log_z = log_q.logsumexp(1, keepdim=True)
    log_q -= log_z

    p = log_p.exp()
    rest = (1 - p.sum(1, keepdim=True)).clamp(min=0)  # float16 may have rounded the sum to more than 1
    if ids.shape[1] == logits.shape[1]:
        rest.zero_()  # no token is left; what remains is rounding
    p, log_p = torch.cat([p, rest], 1), torch.cat([log_p, rest.log()], 1)
    kl = torch.where(p == 0, 0, p * (log_p - log_q)).sum(1, keepdim=True)
    if rows.gradient_wanted:
        of_q = 1 + rows.kl_weight * p.sum(1, keepdim=True)  # the sum is 1, but for rounded log-probabilities
        of_kept = of_q * log_q.exp() - rows.kl_weight * p
        # q (1 - r_p / r_q) without r_q, which may underflow: the others' softmax is others / total, and total >= 1
        of_others = of_q * (top - log_z).exp() - rows.kl_weight * rest / total.clamp(min=1)
        others.mul_(of_others.masked_fill_(rows.ignored, 0))
        others.scatter_(1, ids, of_kept[:, :-1].masked_fill(rows.ignored, 0))
        others.scatter_add_(1, rows.labels, -(~rows.ignored).to(p.dtype))
    return log_z - label_logits, kl


def _chunks(x: Tensor, width: int, dtype: torch.dtype, n_buffers: int) -> list[slice]:
    # On a CPU one buffer has to fit, not all: small buffers win less there than products of 128 rows do.
    copies = n_buffers * dtype.itemsize + x.dtype.itemsize if x.is_cuda else dtype.itemsize
    return row_chunks(x.shape[0], copies * width, x.device)


@torch.library.custom_op("cocomix::linear_distillation", mutates_args=())
def _distillation(
    x: Tensor,  # [N, d]
    weight: Tensor,  # [V, d]
    labels: Tensor,  # [N] int64
    ignore_index: int,
    first_target: Tensor,  # of `FullTargets` where `full`, else of `TopTargets`
    second_target: Tensor,
    full: bool,
    kl_weight: float,
    dx_wanted: bool,
    dw_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    loss, ntp_loss, kl, share, dx, dw = outputs = _outputs(
        x, weight, labels, ignore_index, first_target, second_target, full, kl_weight, dx_wanted, dw_wanted
    )
    for total in (ntp_loss, kl, dw):
        total.zero_()
    n_buffers, width, read_weight = 3 if full else 1, weight.shape[0], _widened(weight)
    if full:
        second_target = _widened(second_target[:width])
    chunks = _chunks(x, width, loss.dtype, n_buffers)
    room = [x.new_empty(chunks[0].stop if chunks else 0, width, dtype=loss.dtype) for _ in range(n_buffers)]
    for rows in chunks:
        buffers, part = [one[: rows.stop - rows.start] for one in room], _widened(x[rows])
        ignored = (labels[rows] == ignore_index)[:, None]
        about = _Rows(labels[rows, None].masked_fill(ignored, 0), ignored, kl_weight, dx_wanted or dw_wanted)
        write_product(buffers[0], part, read_weight.t())
        if full:
            losses = _full_step(buffers, first_target[rows], second_target, about)
        else:
            losses = _top_step(buffers, first_target[rows], second_target[rows], about)
        for total, one in zip((ntp_loss, kl), losses, strict=True):
            total += one.masked_fill(ignored, 0).sum()
        gradient = buffers[0].to(part.dtype)
        if dx_wanted:
            write_product(dx[rows], gradient, read_weight)
        if dw_wanted:
            add_product_(dw, gradient.t(), part)
    count = (labels != ignore_index).sum()
    ntp_loss /= count
    kl /= count
    torch.add(ntp_loss, kl, alpha=kl_weight, out=loss)
    torch.reciprocal(count.clamp(min=1).to(share.dtype), out=share)
    return outputs


@_distillation.register_fake
def _outputs(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    first_target: Tensor,
    second_target: Tensor,
    full: bool,
    kl_weight: float,
    dx_wanted: bool,
    dw_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss, next-token loss, KL, what a token weighs in a mean, and dx [N, d] and dW [V, d] of the sums over tokens."""
    dtype = accumulation_dtype(x.dtype)
    (n, d), width = x.shape, weight.shape[0]
    loss, ntp_loss, kl, share = (x.new_empty((), dtype=dtype) for _ in range(4))
    dx, dw = x.new_empty(n if dx_wanted else 0, d), x.new_empty(width if dw_wanted else 0, d, dtype=dtype)
    return loss, ntp_loss, kl, share, dx, dw


@torch.library.custom_op("cocomix::linear_distillation_backward", mutates_args=())
def _distillation_backward(grad_loss: Tensor, share: Tensor, dx: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    scale = grad_loss * share
    return (dx.to(dw.dtype) * scale).to(dx.dtype), (dw * scale).to(dx.dtype)


@_distillation_backward.register_fake
def _(grad_loss: Tensor, share: Tensor, dx: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dx), torch.empty_like(dw, dtype=dx.dtype)


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *_, dx_wanted, dw_wanted = inputs
    _, ntp_loss, kl, share, dx, dw = output
    ctx.mark_non_differentiable(ntp_loss, kl, share, dx, dw)
    ctx.set_materialize_grads(False)  # or there would be zeros as large as dW for the output dW
    ctx.save_for_backward(share, dx, dw)  # not the weight: it may be gathered for the forward pass alone
    ctx.wanted = dx_wanted, dw_wanted


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 10
    gradients = _distillation_backward(grad_loss, *ctx.saved_tensors)
    return *(g if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True)), *[None] * 8


_distillation.register_autograd(_backward, setup_context=_setup_context)


def _torch_backend(
    x: Tensor, weight: Tensor, labels: Tensor, targets: FullTargets | TopTargets, kl_weight: float, ignore_index: int
) -> DistillationLoss:
    wanted = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    first, second = (t.detach() for t in targets)
    full = isinstance(targets, FullTargets)
    loss, ntp_loss, kl, *_ = _distillation(x, weight, labels, ignore_index, first, second, full, kl_weight, *wanted)
    return DistillationLoss(loss, ntp_loss, kl)


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
    hidden, weight, dtype = _widened(hidden), _widened(weight), accumulation_dtype(hidden.dtype)
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
