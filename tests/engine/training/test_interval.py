import math
import time

import pytest
import torch

from cocomix.distributed.ranks import Ranks
from cocomix.training.interval import Interval, IntervalFigures

ALONE = Ranks(0, 1, torch.device("cpu"))


class Doubled(Ranks):
    """Two ranks that bring the same."""

    def sum(self, tensor):
        return tensor.mul_(2)


def step(loss, ntp_loss):
    return {"loss": torch.tensor(loss), "ntp_loss": torch.tensor(ntp_loss)}


@pytest.mark.parametrize("ranks", [ALONE, Doubled(0, 2, torch.device("cpu"))])
def test_losses_are_means_over_rounds_and_ranks_and_closing_begins_anew(ranks):
    interval = Interval(ranks, rounds=2)
    interval.add(step(4.0, 2.0), False)
    interval.add(step(6.0, 3.0), True)
    figures = interval.close()
    assert figures.losses == [{"loss": 2.0, "ntp_loss": 1.0}, {"loss": 3.0, "ntp_loss": 1.5}]
    assert figures.skipped == [False, True] and figures.step_time_s == figures.seconds / 2
    interval.add(step(1.0, 1.0), False)
    assert interval.close().losses == [{"loss": 0.5, "ntp_loss": 0.5}]


def test_skipped_steps_do_not_enter_the_means():
    losses = [{"b": 1.0, "a": 2.0}, {"b": math.nan, "a": math.inf}, {"b": 3.0, "a": 4.0}]
    assert IntervalFigures(losses, [False, True, False], 1.0).mean_losses() == {"b": 2.0, "a": 3.0}
    assert IntervalFigures(losses[1:2], [True], 1.0).mean_losses() == {}


def test_what_is_paused_does_not_count_as_time(monkeypatch):
    clock = iter([10.0, 11.0, 14.0, 15.0, 15.0])  # made; paused from 11 to 14; closed, and begun anew
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    interval = Interval(ALONE, rounds=1)
    interval.add(step(1.0, 1.0), False)
    with interval.paused():
        pass
    assert interval.close().seconds == 2.0
