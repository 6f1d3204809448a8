"""The operations of CoCoMix. Each knows tensors only; `cocomix_kernels.reference` holds their naive versions."""

from cocomix_kernels.attention.op import interleaved_attention
from cocomix_kernels.attribution.op import concept_attribution
from cocomix_kernels.concept_head.op import ConceptHead, concept_head
from cocomix_kernels.concept_head.topk_linear import topk_linear
from cocomix_kernels.concept_mix.eager import concept_vectors
from cocomix_kernels.concept_mix.op import concept_add, concept_mix
from cocomix_kernels.lm_loss.cross_entropy import linear_cross_entropy
from cocomix_kernels.lm_loss.distillation import (
    DistillationLoss,
    FullTargets,
    TopTargets,
    linear_distillation,
    top_targets,
)

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
