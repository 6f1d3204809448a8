"""The steps between two log lines: their losses and the time that they took."""

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from cocomix.distributed.ranks import Ranks


@dataclass(frozen=True)
class IntervalFigures:
    """Steps in order: `losses` of each by name (nats, means over the global batch), whether it was `skipped`, and the
    `seconds` that they took together."""

    losses: list[dict[str, float]]
    skipped: list[bool]
    seconds: float

    @property
    def step_time_s(self) -> float:
        """Mean seconds a step."""
        return self.seconds / len(self.losses)

    def mean_losses(self) -> dict[str, float]:
        """Means over the steps that were not skipped, by name; empty where all were."""
        taken = [losses for losses, was_skipped in zip(self.losses, self.skipped, strict=True) if not was_skipped]
        return {name: statistics.fmean(losses[name] for losses in taken) for name in (taken[0] if taken else ())}


class Interval:
    """Collects steps, from when it is made or was last closed. What runs inside `paused` does not count as their time.

    `rounds`: micro batches of a step on each rank.
    """

    def __init__(self, ranks: Ranks, rounds: int):
        self._ranks, self._rounds = ranks, rounds
        self._begin()

    def _begin(self) -> None:
        self._sums: list[dict[str, torch.Tensor]] = []
        self._skipped: list[bool] = []
        self._start, self._paused_s = time.perf_counter(), 0.0

    def add(self, sums: dict[str, torch.Tensor], was_skipped: bool) -> None:
        """Take a step: the sums of its losses over this rank's micro batches, by name. Does not wait for them."""
        self._sums.append(sums)
        self._skipped.append(was_skipped)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop the clock inside the block."""
        start = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - start

    def close(self) -> IntervalFigures:
        """The figures of the steps, at least one, over all ranks, which call this together; begins anew."""
        names = sorted(self._sums[0])
        sums = torch.stack([torch.stack([losses[name].double() for name in names]) for losses in self._sums])
        means = (self._ranks.sum(sums) / (self._rounds * self._ranks.world)).tolist()
        seconds = time.perf_counter() - self._start - self._paused_s  # now: the host has waited for the losses
        figures = IntervalFigures([dict(zip(names, step, strict=True)) for step in means], self._skipped, seconds)
        self._begin()
        return figures
