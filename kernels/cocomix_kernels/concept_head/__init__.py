"""Linear layer + exact TopK + concept loss without [N, C] logits; linear layer + exact TopK on the same steps."""

from cocomix_kernels.concept_head.op import ConceptHead, concept_head
from cocomix_kernels.concept_head.topk_linear import topk_linear

__all__ = ["ConceptHead", "concept_head", "topk_linear"]
