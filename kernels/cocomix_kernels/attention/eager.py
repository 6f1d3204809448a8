"""Attention over the doubled sequence by PyTorch's own kernels.

Shapes: B sequences, T tokens, H heads of size D.
"""

# torch.autograd.Function has no types for what it applies.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


class _ConceptQueriesOnCpu(torch.autograd.Function):
    """Two causal flash problems, merged. Given the merged output and log-sum-exp, a flash backward pass over either
    half yields that half's dk and dv exactly, and its share of dq."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
        # q [B, T, H, D], k and v [B, 2T, H, D]
        q = q.transpose(1, 2)
        outs, lses = zip(
            *(
                _aten._scaled_dot_product_flash_attention_for_cpu(q, k_half, v_half, 0.0, True, scale=scale)
                for k_half, v_half in zip(_halves(k), _halves(v), strict=True)
            ),
            strict=True,
        )
        lse = torch.logaddexp(*lses)  # [B, H, T], float32 for bfloat16 inputs
        share = (lses[1] - lse).exp()[..., None]
        even, odd = (part.to(lse.dtype) for part in outs)
        out = torch.lerp(even, odd, share).to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grads
        q, k, v, out, lse = ctx.saved_tensors
        dq: Any = 0
        dk, dv = torch.empty_like(k), torch.empty_like(v)
        for k_half, v_half, dk_half, dv_half in zip(*map(_halves, (k, v, dk, dv)), strict=True):
            dq_part, dk_part, dv_part = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad.transpose(1, 2), q, k_half, v_half, out, lse, 0.0, True, scale=ctx.scale
            )
            dq = dq + dq_part
            dk_half.copy_(dk_part)
            dv_half.copy_(dv_part)
        return dq.transpose(1, 2), dk, dv, None


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    # [B, 2T, H, D] -> its even and its odd positions as [B, H, T, D] views
    return x[:, 0::2].transpose(1, 2), x[:, 1::2].transpose(1, 2)


def _masked_concept_queries(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    length = q.shape[1]
    positions = torch.arange(2 * length, device=q.device)
    mask = positions <= positions[1::2, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def torch_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """`interleaved_attention` on any device: q [B, 2T or T, H, D], k and v [B, 2T, H, D] -> like q."""
    if q.shape[1] == k.shape[1]:
        return torch_causal(q, k, v, scale)
    if q.device.type == "cpu":
        return _ConceptQueriesOnCpu.apply(q, k, v, scale)
    return _masked_concept_queries(q, k, v, scale)


def torch_causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Plain causal attention, [B, S, H, D] each, by the kernel that PyTorch chooses."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
