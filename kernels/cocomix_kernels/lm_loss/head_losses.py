"""Losses of the language-model head a chunk of rows at a time: next-token cross-entropy, with a KL term or without.

Shapes: N tokens, d width of the student, d_t of the teacher, V tokens of the student's vocabulary, V_t rows of the
teacher's head, J tokens kept of the teacher's distribution, 0 where nothing is learned from it; R rows of a chunk.

Student's logits z (softmax q) exist a chunk of rows at a time, and the teacher's beside them where its whole
distribution p is asked for. While a chunk is at hand, the gradient of both losses is taken from it and multiplied into
dx and dW at once, as Liger-Kernel's fused linear cross-entropy does (arXiv 2410.10989); the backward pass only scales
those. So forward and backward do three products of N*V*d, in the inputs' dtype with sums in float32, and the teacher's
N*V*d_t. There is no Triton kernel: the products are the library's and take most of the time.

PyTorch's own linear_cross_entropy (2.13) is slower on a CPU: its sums over chunks are in the inputs' dtype, so that
bfloat16 inputs have to be widened first, and it multiplies 128 rows at a time (LOG.md).
"""

# torch.library has no types for what it decorates.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cocomix_kernels.common.chunking import accumulation_dtype, row_chunks
from cocomix_kernels.common.products import add_product_, scaled, write_product


class _Rows(NamedTuple):
    """What both kinds of targets need of a chunk beside its logits."""

    labels: Tensor  # [R, 1] int64, 0 where ignored
    ignored: Tensor  # [R, 1] bool
    kl_weight: float
    gradient_wanted: bool


def widened(matrix: Tensor) -> Tensor:
    """The teacher's side of a product as it is multiplied: a CPU would round the logits to the factors' dtype."""
    return matrix if matrix.is_cuda else matrix.to(accumulation_dtype(matrix.dtype))


def _full_step(buffers: list[Tensor], hidden: Tensor, teacher_weight: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
    """Losses of a chunk [R, 1] each, against the teacher's whole distribution; hidden [R, d_t].

    The first of three buffers [R, V] comes with the student's logits and leaves with their gradient, unless unwanted.
    """
    first, log_q, log_p = buffers
    torch.log_softmax(first, 1, out=log_q)
    ntp = -log_q.gather(1, rows.labels)
    write_product(first, widened(hidden).masked_fill(rows.ignored, 0), teacher_weight.t())
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


@torch.library.custom_op("cocomix::lm_head_losses", mutates_args=())
def _lm_head_losses(
    x: Tensor,  # [N, d]
    weight: Tensor,  # [V, d]
    labels: Tensor,  # [N] int64
    ignore_index: int,
    first_target: Tensor,  # hidden [N, d_t] where `full`, else ids [N, J]
    second_target: Tensor,  # head [V_t, d_t] where `full`, else log-probabilities [N, J]
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
    n_buffers, width = 3 if full else 1, weight.shape[0]
    if full:
        second_target = widened(second_target[:width])
    chunks = _chunks(x, width, loss.dtype, n_buffers)
    room = [x.new_empty(chunks[0].stop if chunks else 0, width, dtype=loss.dtype) for _ in range(n_buffers)]
    for rows in chunks:
        buffers, part = [one[: rows.stop - rows.start] for one in room], x[rows]
        ignored = (labels[rows] == ignore_index)[:, None]
        about = _Rows(labels[rows, None].masked_fill(ignored, 0), ignored, kl_weight, dx_wanted or dw_wanted)
        write_product(buffers[0], part, weight.t())
        if full:
            losses = _full_step(buffers, first_target[rows], second_target, about)
        else:
            losses = _top_step(buffers, first_target[rows], second_target[rows], about)
        for total, one in zip((ntp_loss, kl), losses, strict=True):
            total += one.masked_fill(ignored, 0).sum()
        gradient = buffers[0].to(part.dtype)
        if dx_wanted:
            write_product(dx[rows], gradient, weight)
        if dw_wanted:
            add_product_(dw, gradient.t(), part)
    count = (labels != ignore_index).sum()
    ntp_loss /= count
    kl /= count
    torch.add(ntp_loss, kl, alpha=kl_weight, out=loss)
    torch.reciprocal(count.clamp(min=1).to(share.dtype), out=share)
    return outputs


@_lm_head_losses.register_fake
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


@torch.library.custom_op("cocomix::lm_head_losses_backward", mutates_args=())
def _lm_head_losses_backward(grad_loss: Tensor, share: Tensor, dx: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
    scale = grad_loss * share
    return (dx.to(dw.dtype) * scale).to(dx.dtype), scaled(dw, scale, dx.dtype)


@_lm_head_losses_backward.register_fake
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
    gradients = _lm_head_losses_backward(grad_loss, *ctx.saved_tensors)
    return *(g if wanted else None for g, wanted in zip(gradients, ctx.wanted, strict=True)), *[None] * 8


_lm_head_losses.register_autograd(_backward, setup_context=_setup_context)


def lm_head_losses(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    targets: tuple[Tensor, Tensor] | None = None,
    full: bool = False,
    kl_weight: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scalars: ntp_loss + kl_weight * kl, through which gradients reach x and weight, then ntp_loss and kl alone.

    x [N, d], weight [V, d], labels [N] int64. `targets`, constants: with `full` the teacher's hidden states [N, d_t]
    and head [V_t, d_t], else ids and log-probabilities [N, J]; without any, kl is 0.
    """
    wanted = (torch.is_grad_enabled() and t.requires_grad for t in (x, weight))
    first, second = targets or (labels.new_empty(len(x), 0), x.new_empty(len(x), 0))
    outputs = _lm_head_losses(
        x, weight, labels, ignore_index, first.detach(), second.detach(), full, kl_weight, *wanted
    )
    return outputs[0], outputs[1], outputs[2]
