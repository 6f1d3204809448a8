"""Concept labels: k sampled dot products a token."""

from cocomix_kernels.attribution.op import concept_attribution

__all__ = ["concept_attribution"]
