"""The learning rate over the steps of a run, as a share of its peak."""

import math
from collections.abc import Callable

from cocomix.core.config import TrainConfig


def learning_rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """Step (0-based) -> share of the peak rate, for a run of `total_steps`.

    After a linear warm-up, by `train.schedule`: "cosine", as in the paper, and "linear" fall to `min_lr_ratio` at the
    end; "constant" stays; "wsd" stays and falls in the last `decay_share` of the steps, by one minus the square root of
    what has passed of them (Hägele et al., arXiv 2405.18392). Until it falls, "wsd" does not depend on `total_steps`.
    """
    start = decay_start(config, total_steps)

    def factor(step: int) -> float:
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if step < start or config.schedule == "constant":
            return 1.0
        progress = min(1.0, (step - start) / max(1, total_steps - start))
        return config.min_lr_ratio + (1 - config.min_lr_ratio) * _LEFT[config.schedule](progress)

    return factor


def decay_start(config: TrainConfig, total_steps: int) -> int:
    """The step (0-based) from which on the rate falls; `total_steps` where it never does."""
    if config.schedule == "constant":
        return total_steps
    if config.schedule == "wsd":
        return max(config.warmup_steps, total_steps - math.ceil(config.decay_share * total_steps))
    return config.warmup_steps


# What is left of the way between the peak and the end, by the share of the decay that has passed.
_LEFT: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1 - progress,
    "wsd": lambda progress: 1 - math.sqrt(progress),
}
