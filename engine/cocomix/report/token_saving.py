"""How many tokens a run saves against plain next-token prediction (NTP) at equal validation loss."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cocomix.report.arms import Arm


@dataclass(frozen=True)
class Saving:
    """Tokens after which a method and NTP first had a validation loss of `loss` (nats), which both reached.

    `share` is the saving, 1 - own / baseline tokens: 0.215 in the paper at 1.38B parameters; negative where the method
    needs more. `low` and `high` bound it by the evaluations on either side of the two crossings. Of several seeds it is
    the mean of their savings, and the bounds hold those of all; `of_seeds` are the single ones, by which the spread of
    seeds is told.
    """

    loss: float
    tokens: float
    baseline_tokens: float
    share: float
    low: float
    high: float
    of_seeds: tuple[float, ...] = ()

    def at_cost(self, ratio: float) -> float:
        """The share that is saved of something of which the run needs `ratio` times as much a token as the NTP run:
        arithmetic, or time. Its bounds follow from `low` and `high` in the same way."""
        return 1 - (1 - self.share) * ratio


def arm_saving(arm: Arm, baseline: Arm) -> Saving | None:
    """The mean saving of the arm's seeds, each against the baseline's of that seed, or where it has none against the
    baseline's mean. None where a seed has no saving that can be told, and where one of the two curves holds ends of
    several budgets and the other a run's way to its end, at rates that had not fallen yet."""
    if arm.has_budgets != baseline.has_budgets:
        return None
    found = [saving(curve, baseline.curves.get(seed, baseline.evaluations)) for seed, curve in arm.curves.items()]
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found):
        return None
    if len(known) == 1:
        return known[0]
    mean = {key: statistics.fmean(getattr(one, key) for one in known) for key in ("loss", "tokens", "baseline_tokens")}
    shares = tuple(one.share for one in known)
    low, high = min(one.low for one in known), max(one.high for one in known)
    return Saving(**mean, share=statistics.fmean(shares), low=low, high=high, of_seeds=shares)


def arithmetic_ratio(found: Saving, arm: Arm, baseline: Arm) -> float | None:
    """Arithmetic of a token of the arm over that of the baseline's, on the way to the loss of the saving that was
    `found`; None where a run does not tell."""
    own, base = arm.flops(found.tokens), baseline.flops(found.baseline_tokens)
    return (own / found.tokens) / (base / found.baseline_tokens) if own and base else None


def saving(own: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> Saving | None:
    """The saving of one run's evaluations against another's, at the better loss that both reached; None where one has
    fewer than two (finite) evaluations, or was past that loss at its first one, so that nobody knows when it reached
    it."""
    curves = [[(e["tokens"], e["loss"]) for e in some if math.isfinite(e["loss"])] for some in (own, base)]
    if min(map(len, curves)) < 2:
        return None
    target = max(min(loss for _, loss in curve) for curve in curves)
    if any(curve[0][1] < target for curve in curves):
        return None
    (before, at, after), (base_before, base_at, base_after) = (_crossing(curve, target) for curve in curves)
    return Saving(target, at, base_at, 1 - at / base_at, 1 - after / base_before, 1 - before / base_after)


def _crossing(curve: list[tuple[float, float]], target: float) -> tuple[float, float, float]:
    """Tokens of the last evaluation above the loss `target` and of the first one not above it, and between them where
    the line through the two, over the logarithm of the tokens, crosses it."""
    first = next(i for i, (_, loss) in enumerate(curve) if loss <= target)
    after, loss = curve[first]
    if loss == target:
        return after, after, after
    before, loss_before = curve[first - 1]
    share = (loss_before - target) / (loss_before - loss)
    return before, math.exp(math.log(before) + share * math.log(after / before)), after
