"""Causal attention over the doubled sequence, and its concept-query form for the last block.

Shapes: B sequences, T tokens, S = 2T positions, H heads of size D. Layout [B, S, H, D], as the QKV product leaves it.

A concept query t sits at position 2t + 1 and sees the hidden states 0..t and the concepts 0..t: over the even keys
and over the odd keys alike that is an ordinary causal problem of T queries and T keys. So two calls of a library's
causal kernel, merged by their log-sum-exps, do exactly the work that is needed, without a mask.
"""

import torch
import torch.nn.functional as F

from cocomix.kernels.checks import check_same, check_shapes
from cocomix.kernels.dispatch import choose_backend

_aten = torch.ops.aten


class _ConceptQueriesOnCpu(torch.autograd.Function):
    """Two causal flash problems, merged. Given the merged output and log-sum-exp, a flash backward pass over either
    half yields that half's dk and dv exactly, and its share of dq."""

    @staticmethod
    def forward(ctx, q, k, v, scale):  # q [B, T, H, D], k and v [B, 2T, H, D]
        q = q.transpose(1, 2)
        outs, lses = zip(*(
            _aten._scaled_dot_product_flash_attention_for_cpu(q, k_half, v_half, 0.0, True, scale=scale)
            for k_half, v_half in zip(_halves(k), _halves(v), strict=True)
        ), strict=True)
        lse = torch.logaddexp(*lses)  # [B, H, T], float32 for bfloat16 inputs
        share = (lses[1] - lse).exp()[..., None]
        out = torch.lerp(*(part.to(lse.dtype) for part in outs), share).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        dq, dk, dv = 0, torch.empty_like(k), torch.empty_like(v)
        for k_half, v_half, dk_half, dv_half in zip(*map(_halves, (k, v, dk, dv)), strict=True):
            dq_part, dk_part, dv_part = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad.transpose(1, 2), q, k_half, v_half, out, lse, 0.0, True, scale=ctx.scale
            )
            dq = dq + dq_part
            dk_half.copy_(dk_part)
            dv_half.copy_(dv_part)
        return dq.transpose(1, 2), dk, dv, None


def _halves(x):  # [B, 2T, H, D] -> its even and its odd positions as [B, H, T, D] views
    return x[:, 0::2].transpose(1, 2), x[:, 1::2].transpose(1, 2)


def _masked_concept_queries(q, k, v, scale):
    length = q.shape[1]
    positions = torch.arange(2 * length, device=q.device)
    mask = positions <= positions[1::2, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def _torch_backend(q, k, v, scale):
    if q.shape[1] == k.shape[1]:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    if q.device.type == "cpu":
        return _ConceptQueriesOnCpu.apply(q, k, v, scale)
    return _masked_concept_queries(q, k, v, scale)


def interleaved_attention(q, k, v, *, scale=None, backend=None) -> torch.Tensor:
    """Softmax attention over interleaved hidden states (even positions) and concepts (odd positions).

    k, v [B, 2T, H, D]. q [B, 2T, H, D]: ordinary causal attention -> [B, 2T, H, D]. q [B, T, H, D]: concept queries,
    row t sits at position 2t + 1 and sees positions 0..2t+1 -> [B, T, H, D]. One floating dtype; `scale` defaults to
    1/sqrt(D). Gradients reach q, k and v.

    Source: CoCoMix (arXiv 2502.08524), section 3: interleaving; only concept positions are read after the last
    block, so its queries are needed there alone. Raises `ValueError` for shapes, dtypes or devices that do not fit.
    """
    sizes = check_shapes("interleaved_attention", k=(k, "B S H D"), v=(v, "B S H D"))
    check_same("interleaved_attention", q=q, k=k, v=v)
    if sizes["S"] % 2:
        raise ValueError(f"interleaved_attention: k has {sizes['S']} positions, expected an even number (2T)")
    length = sizes["S"] if q.dim() == 4 and q.shape[1] == sizes["S"] else sizes["S"] // 2
    check_shapes("interleaved_attention", k=(k, "B S H D"), q=(q, f"B {length} H D"))
    return choose_backend("interleaved_attention", {"torch": _torch_backend}, backend, q.device)(q, k, v, scale)
