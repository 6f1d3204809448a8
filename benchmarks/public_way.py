"""How the public CoCoMix code computes each operation, in our words: the baseline that the project is compared with.

It works on dense [N, C] matrices throughout: logits, a mask of the kept ones and a masked copy, latents, attributions.
Weights have the layout of `nn.Linear`: [C, d] into concepts, [d, C] out of them. Plain PyTorch, so that
`torch.compile` may do with it what it can. Source: CoCoMix (arXiv 2502.08524). Distillation is the way it is commonly
written, over [N, V] logits.

Shapes: N tokens, B sequences of T tokens, d width, C concepts, k kept concepts, K labels, H heads of size D.
"""

import torch
import torch.nn.functional as F


def concept_head(x, weight, bias, k, labels=None):
    """Logits, TopK, mask, masked copy, and one cross-entropy a label over float32 logits, averaged.

    x [N, d], weight [C, d], bias [C], labels [N, K] -> masked [N, C], indices [N, k], loss or None. Equal to the
    method where every token has all its labels (else each of the K means has its own divisor).
    """
    logits = F.linear(x, weight, bias)  # [N, C]
    _, indices = logits.topk(k, dim=-1)
    mask = torch.zeros_like(logits).scatter_(-1, indices, 1)
    masked = logits * mask
    if labels is None:
        return masked, indices, None
    wide = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    losses = [F.cross_entropy(wide, one, ignore_index=-1) for one in labels.unbind(1)]
    return masked, indices, torch.stack(losses).mean()


def sae_encode(x, weight, bias, k):
    """Linear layer, TopK, ReLU, and the latents scattered into a dense matrix.

    x [N, d], weight [C, d], bias [C] -> latents [N, C].
    """
    activations = F.linear(x, weight, bias)  # [N, C]
    values, indices = activations.topk(k, dim=-1)
    return torch.zeros_like(activations).scatter_(-1, indices, values.relu())


def attribution(latents, grad, decoder, label_topk):
    """Dense latents times dense decoded gradients, and the largest of all C, zeros included.

    latents [N, C], grad [N, d], decoder [d, C] -> attributions [N, K], labels [N, K].
    """
    return (latents * (grad @ decoder)).topk(label_topk, dim=-1)


def compress(masked, weight, bias, pre_bias, mean, std):
    """Dense product with all C columns, and de-normalisation.

    masked [B, T, C], weight [d, C], bias and pre_bias [d], mean and std [B, T, 1] -> [B, T, d].
    """
    return (F.linear(masked, weight, bias) + pre_bias) * std + mean


def mix(hidden, masked, weight, bias, pre_bias, mean, std):
    """`compress`, then `stack` and `view`.

    hidden [B, T, d], masked [B, T, C], weight [d, C], bias and pre_bias [d], mean and std [B, T, 1] -> [B, 2T, d].
    """
    concept = compress(masked, weight, bias, pre_bias, mean, std)
    batch, length, width = hidden.shape
    return torch.stack([hidden, concept.to(hidden.dtype)], dim=2).view(batch, 2 * length, width)


def attention(q, k, v):
    """The library's causal attention over all 2T positions. q, k, v [B, 2T, H, D] -> [B, 2T, H, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def last_attention(q, k, v):
    """The last block's: attention for all 2T positions, of which the concepts' are kept. -> [B, T, H, D]."""
    return attention(q, k, v)[:, 1::2]


def distillation(x, weight, labels, hidden, teacher_weight, distillation_weight):
    """Cross-entropy and KL over float32 logits of student and teacher.

    x [N, d], weight [V, d], labels [N], hidden [N, d_t], teacher_weight [V, d_t] -> loss, next-token loss, KL.
    """
    logits = _wide(F.linear(x, weight))  # [N, V]
    with torch.no_grad():
        teacher = _wide(F.linear(hidden, teacher_weight)).log_softmax(-1)
    ntp_loss = F.cross_entropy(logits, labels)
    kl = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="batchmean")
    return ntp_loss + distillation_weight * kl, ntp_loss, kl


def top_distillation(x, weight, labels, ids, log_probs, distillation_weight):
    """The same against the teacher's J most probable tokens and one more that has the rest of the mass.

    x [N, d], weight [V, d], labels [N], ids and log_probs [N, J] -> loss, next-token loss, KL.
    """
    logits = _wide(F.linear(x, weight))  # [N, V]
    ntp_loss = F.cross_entropy(logits, labels)
    log_q, log_p = (_with_rest(t) for t in (logits.log_softmax(-1).gather(1, ids), log_probs.to(logits.dtype)))
    kl = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    return ntp_loss + distillation_weight * kl, ntp_loss, kl


def _wide(logits):
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def _with_rest(log_probs):
    return torch.cat([log_probs, torch.log1p(-log_probs.exp().sum(1, keepdim=True))], 1)
