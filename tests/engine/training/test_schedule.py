"""The learning rate over a run's steps."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocomix.core.config import SCHEDULES, TrainConfig
from cocomix.training.schedule import decay_start, learning_rate_factor


def factors(total, **settings):
    factor = learning_rate_factor(TrainConfig(**settings), total)
    return [factor(step) for step in range(total + 1)]


def test_the_rate_warms_up_linearly_and_falls_on_a_cosine_to_its_share():
    found = factors(110, warmup_steps=10, min_lr_ratio=0.1)
    assert [found[step] for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert found[60] == pytest.approx(0.55)
    assert found[35] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert found[110] == learning_rate_factor(TrainConfig(warmup_steps=10), 110)(500) == pytest.approx(0.1)
    assert factors(10, warmup_steps=0)[0] == 1
    assert factors(4, warmup_steps=10)[3] == pytest.approx(0.4)


def test_the_rate_falls_on_a_line():
    found = factors(110, schedule="linear", warmup_steps=10, min_lr_ratio=0.2)
    assert [found[step] for step in (9, 10, 60, 110)] == pytest.approx([1, 1, 0.6, 0.2])


def test_the_rate_stays():
    assert factors(30, schedule="constant", warmup_steps=2) == [0.5, *[1] * 30]


def test_the_rate_stays_and_falls_at_the_end_by_a_square_root():
    found = factors(100, schedule="wsd", warmup_steps=4, decay_share=0.25, min_lr_ratio=0)
    assert found[3:76] == [1] * 73
    assert [found[step] for step in (79, 100)] == pytest.approx([1 - math.sqrt(4 / 25), 0])


@given(st.sampled_from(SCHEDULES), st.integers(1, 60), st.integers(0, 80), st.floats(0, 1), st.floats(0.01, 1))
def test_rates_lie_between_nothing_and_the_peak_and_never_rise_after_the_warm_up(schedule, total, warmup, least, share):
    config = TrainConfig(schedule=schedule, warmup_steps=warmup, min_lr_ratio=least, decay_share=share)
    factor = learning_rate_factor(config, total)
    rates = [factor(step) for step in range(total + 20)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert all(before >= after for before, after in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    start = decay_start(config, total)
    assert all(rate == 1 for rate in rates[warmup:start])


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.01, 1))
def test_until_it_decays_a_run_has_the_rates_of_a_longer_one(total, more, share):
    config = TrainConfig(schedule="wsd", warmup_steps=5, decay_share=share)
    short, long = (learning_rate_factor(config, steps) for steps in (total, total + more))
    assert all(short(step) == long(step) for step in range(min(decay_start(config, total), total)))
