"""Causal attention over the doubled sequence, for all queries or for concept queries only."""

from cocomix_kernels.attention.op import interleaved_attention

__all__ = ["interleaved_attention"]
