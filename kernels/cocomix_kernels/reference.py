"""Every operation once more, naive, as the method writes it: the truth that tests and benchmarks compare with.

Shapes: N tokens, B sequences of T tokens, C concepts, d width, k kept concepts, K labels, H heads of size D.
Nothing here is chunked or fused; run it in float64 on small shapes.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cocomix_kernels.concept_head.op import ConceptHead
from cocomix_kernels.lm_loss.distillation import DistillationLoss, FullTargets, TopTargets


def _sorted_topk(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    values, indices = torch.sort(logits, dim=-1, descending=True, stable=True)
    return values[..., :k], indices[..., :k]


def concept_head(x: Tensor, weight: Tensor, bias: Tensor, k: int, labels: Tensor | None = None) -> ConceptHead:
    """Linear layer, TopK of its logits and the multi-label cross-entropy, with the [N, C] logits in full."""
    logits = x @ weight.T + bias  # [N, C]
    values, indices = _sorted_topk(logits, k)
    if labels is None:
        return ConceptHead(values, indices, None)
    valid = labels >= 0
    count = valid.sum(1)
    log_p = logits.log_softmax(-1).gather(1, labels.clamp(min=0).long())  # [N, K]
    per_token = -torch.where(valid, log_p, 0).sum(1) / count.clamp(min=1)
    return ConceptHead(values, indices, per_token.sum() / (count > 0).sum().clamp(min=1))


def topk_linear(x: Tensor, weight: Tensor, bias: Tensor, k: int, *, relu: bool = False) -> tuple[Tensor, Tensor]:
    """Linear layer and TopK of its outputs, optionally with ReLU after the selection."""
    values, indices = _sorted_topk(x @ weight.T + bias, k)
    return (values.relu() if relu else values), indices


def concept_attribution(values: Tensor, indices: Tensor, grad: Tensor, decoder: Tensor, label_topk: int) -> Tensor:
    """Dense attribution a * (decoder @ g), then the largest strictly positive entries, -1 where there are none."""
    n_tokens, n_concepts = values.shape[0], decoder.shape[0]
    latents = torch.zeros(n_tokens, n_concepts, dtype=values.dtype, device=values.device)
    latents.scatter_(1, indices, values)
    attribution = latents * (grad.to(values.dtype) @ decoder.to(values.dtype).T)  # [N, C]
    padded = F.pad(attribution, (0, max(0, label_topk - n_concepts)))
    best, labels = _sorted_topk(padded, label_topk)
    return torch.where(best > 0, labels, -1)


def _concepts(
    values: Tensor, indices: Tensor, weight: Tensor, bias: Tensor, pre_bias: Tensor, mean: Tensor, std: Tensor
) -> Tensor:
    code = torch.zeros(*values.shape[:2], weight.shape[0], dtype=values.dtype, device=values.device)
    code = code.scatter(2, indices, values)
    return (code @ weight.to(code.dtype) + bias + pre_bias) * std + mean


def concept_mix(
    hidden: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    residual: bool = False,
) -> Tensor:
    """Dense sparse-code vector, linear layer, de-normalisation, then h and c interleaved by stack and view; with
    `residual` h + c - mean in place of c."""
    batch, length, width = hidden.shape
    if residual:  # h + c - mean, in which the mean cancels
        concept = hidden + _concepts(values, indices, weight, bias, pre_bias, torch.zeros_like(mean), std)
    else:
        concept = _concepts(values, indices, weight, bias, pre_bias, mean, std)
    return torch.stack([hidden, concept.to(hidden.dtype)], dim=2).view(batch, 2 * length, width)


def concept_add(
    hidden: Tensor,
    values: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor,
    pre_bias: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Tensor:
    """Dense sparse-code vector, linear layer, de-normalisation, then h + c."""
    return hidden + _concepts(values, indices, weight, bias, pre_bias, mean, std).to(hidden.dtype)


def interleaved_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> Tensor:
    """Softmax attention with an explicit mask; queries sit at every position or at the odd ones."""
    n_queries, n_keys = q.shape[1], k.shape[1]
    positions = torch.arange(n_keys, device=q.device)
    query_positions = positions if n_queries == n_keys else 2 * torch.arange(n_queries, device=q.device) + 1
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores.masked_fill(positions > query_positions[:, None], -torch.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def linear_cross_entropy(x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Tensor:
    """Logits in full and their mean cross-entropy."""
    return F.cross_entropy(x @ weight.T, labels, ignore_index=ignore_index)


def linear_distillation(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    targets: FullTargets | TopTargets,
    distillation_weight: float,
    *,
    ignore_index: int = -100,
) -> DistillationLoss:
    """Logits in full, cross-entropy and KL; beside kept targets, all other tokens are one more."""
    kept = labels != ignore_index
    logits = x[kept] @ weight.T  # [n, V]
    first, second = (t.to(logits.dtype) if t.is_floating_point() else t for t in targets)
    log_q = logits.log_softmax(-1)
    if isinstance(targets, FullTargets):
        log_p = (first[kept] @ second[: len(weight)].T).log_softmax(-1)
    else:
        ids, log_p = first[kept].long(), second[kept]
        log_rest = log_q.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        rest = (1 - log_p.exp().sum(1, keepdim=True)).clamp(min=0)
        log_q = log_q.gather(1, ids)
        if ids.shape[1] < len(weight):
            log_q, log_p = torch.cat([log_q, log_rest], 1), torch.cat([log_p, rest.log()], 1)
    p = log_p.exp()
    kl = (p * torch.where(p > 0, log_p - log_q, 0)).sum(1).mean()
    ntp_loss = F.cross_entropy(logits, labels[kept].long())
    return DistillationLoss(ntp_loss + distillation_weight * kl, ntp_loss.detach(), kl.detach())
