"""Next-token cross-entropy and distillation without [N, V] logits."""

from cocomix_kernels.lm_loss.cross_entropy import linear_cross_entropy
from cocomix_kernels.lm_loss.distillation import (
    DistillationLoss,
    FullTargets,
    TopTargets,
    linear_distillation,
    top_targets,
)

__all__ = [
    "DistillationLoss",
    "FullTargets",
    "TopTargets",
    "linear_cross_entropy",
    "linear_distillation",
    "top_targets",
]
