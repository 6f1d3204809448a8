"""How many tokens a run saves against plain next-token prediction (NTP) at equal validation loss."""

import math
from dataclasses import dataclass

from cocomix.report.runs import Run


@dataclass(frozen=True)
class Saving:
    """Tokens after which a run and the NTP run first had a validation loss of `loss` (nats), which both reached.

    `share` is the saving, 1 - own / baseline tokens: 0.215 in the paper at 1.38B parameters; negative where the run
    needs more. `low` and `high` bound it by the evaluations on either side of the two crossings. What another seed
    would give is not in them.
    """

    loss: float
    tokens: float
    baseline_tokens: float
    share: float
    low: float
    high: float

    def at_cost(self, ratio: float) -> float:
        """The share that is saved of something of which the run needs `ratio` times as much a token as the NTP run:
        arithmetic, or time. Its bounds follow from `low` and `high` in the same way."""
        return 1 - (1 - self.share) * ratio


def saving(run: Run, baseline: Run) -> Saving | None:
    """The saving at the better loss that both runs reached; None where one has fewer than two (finite) evaluations, or
    was past that loss at its first one, so that nobody knows when it reached it."""
    curves = [[(e["tokens"], e["loss"]) for e in r.evaluations if math.isfinite(e["loss"])] for r in (run, baseline)]
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
