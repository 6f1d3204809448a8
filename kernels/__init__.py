"""The operations of CoCoMix. Each knows tensors only; `cocomix.kernels.reference` holds their naive versions."""

from cocomix.kernels.attribution import concept_attribution
from cocomix.kernels.concept_head import ConceptHead, concept_head
from cocomix.kernels.concept_mix import concept_add, concept_mix, concept_vectors
from cocomix.kernels.interleaved_attention import interleaved_attention
from cocomix.kernels.linear_cross_entropy import linear_cross_entropy
from cocomix.kernels.linear_distillation import (
    DistillationLoss,
    FullTargets,
    TopTargets,
    linear_distillation,
    top_targets,
)
from cocomix.kernels.topk_linear import topk_linear

__all__ = [
    "ConceptHead",
    "DistillationLoss",
    "FullTargets",
    "TopTargets",
    "concept_add",
    "concept_attribution",
    "concept_head",
    "concept_mix",
    "concept_vectors",
    "interleaved_attention",
    "linear_cross_entropy",
    "linear_distillation",
    "top_targets",
    "topk_linear",
]
