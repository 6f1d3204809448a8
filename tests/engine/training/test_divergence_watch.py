import json
import math

import pytest

from cocomix.core.config import Config, DataConfig, TrainConfig
from cocomix.core.errors import CocomixError
from cocomix.data.windows import WindowOrder, step_windows
from cocomix.training.divergence_watch import DivergenceWatch
from cocomix.training.interval import IntervalFigures


class Split:
    """A token file of a hundred windows."""

    def n_windows(self, seq_len):
        return 100


def watch(**train):
    config = Config(data=DataConfig(folder="somewhere"), train=TrainConfig(global_batch=6, seed=3, **train))
    return DivergenceWatch(config, Split())


def figures(*losses, skipped=()):
    return IntervalFigures([{"loss": loss} for loss in losses], [i in skipped for i in range(len(losses))], 1.0)


def windows(step):
    """What a step (from 1) reads."""
    return step_windows(WindowOrder(100, 3), step - 1, 6).tolist()


def test_too_many_skipped_steps_in_a_row_are_divergence_and_it_names_what_the_last_one_read():
    seen = watch(max_skipped_steps=3)
    found = []
    for was_skipped in (True, True, False, True, True, True):
        seen.count(was_skipped)
        found.append(seen.has_diverged)
    assert found == [False] * 5 + [True]
    read = ", ".join(map(str, windows(6)[:4]))
    expected = f"diverged at step 6: in 3 steps in a row .* read windows {read} and 2 more .* of somewhere/train.bin"
    with pytest.raises(CocomixError, match=expected):
        seen.require_no_divergence(6)
    seen.count(False)
    seen.require_no_divergence(7)


def test_an_interval_gives_events_for_its_skipped_steps_and_spikes(monkeypatch):
    monkeypatch.setattr("cocomix.training.loss_watch._SETTLED_STEPS", 3)
    seen = watch(spike_deviations=6.0)
    assert seen.observe(figures(3.0, 3.1, 2.9), last_step=3) == []
    skipped, spike = seen.observe(figures(3.0, math.inf, 9.0, 3.0, skipped=[1]), last_step=7)
    assert (skipped.kind, skipped.step, skipped.loss, skipped.windows) == ("skipped", 5, math.inf, windows(5))
    assert (spike.kind, spike.step, spike.loss, spike.windows) == ("spike", 6, 9.0, windows(6))
    assert spike.where.startswith(f"windows {windows(6)[0]}, ")


def test_state_goes_through_json():
    seen, other = watch(max_skipped_steps=2), watch(max_skipped_steps=2)
    seen.observe(figures(3.0, 2.5), last_step=2)
    seen.count(True)
    assert seen.state() == {"steps": 2, "mean": 2.75, "variance": pytest.approx(0.0625), "skipped_in_a_row": 1}
    other.restore(json.loads(json.dumps(seen.state())))
    assert other.state() == seen.state()
    other.count(True)
    assert other.has_diverged
