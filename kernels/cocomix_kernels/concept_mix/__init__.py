"""Sparse projection of the kept concepts, de-normalised, interleaved with the hidden states or added to them."""

from cocomix_kernels.concept_mix.eager import concept_vectors
from cocomix_kernels.concept_mix.op import concept_add, concept_mix

__all__ = ["concept_add", "concept_mix", "concept_vectors"]
