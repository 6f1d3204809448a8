import json
import random

import pytest

from cocomix.training.loss_watch import LossWatch


def settled(deviations=6.0):
    """A watch after 200 losses around 3 with a standard deviation of 0.1."""
    draw, watch = random.Random(0), LossWatch(deviations)
    assert not any(watch.observe(draw.gauss(3, 0.1)) for _ in range(200))
    return watch


def test_mean_and_deviation_follow_the_losses():
    state = settled().state()
    assert state["mean"] == pytest.approx(3, abs=0.03) and state["variance"] == pytest.approx(0.01, rel=0.5)
    assert state["steps"] == 200


@pytest.mark.parametrize(("loss", "is_spike"), [(3.3, False), (4.0, True), (2.0, False)])
def test_a_spike_lies_many_deviations_above_the_mean(loss, is_spike):
    assert settled().observe(loss) is is_spike
    assert not settled(deviations=0).observe(loss)


def test_a_spike_does_not_raise_what_later_ones_are_measured_by():
    watch = settled()
    before = watch.state()
    assert watch.observe(30.0) and watch.observe(30.0)
    assert watch.state() == before


def test_the_fall_at_the_beginning_and_rounding_are_no_spikes():
    watch = LossWatch(6.0)
    assert not any(watch.observe(loss) for loss in [9.0, 30.0, 8.0] + [7.0] * 100)
    flat = LossWatch(6.0)
    assert not any(flat.observe(2.0) for _ in range(100)) and not flat.observe(2.05) and flat.observe(2.2)


def test_state_goes_through_json_bit_for_bit():
    watch, other = settled(), LossWatch(6.0)
    other.restore(json.loads(json.dumps(watch.state())))
    assert other.state() == watch.state()
    assert other.observe(3.1) == watch.observe(3.1) and other.state() == watch.state()
