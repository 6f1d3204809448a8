import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cocomix.report.token_saving import Saving, arm_saving, saving


def run(*points):
    return [{"tokens": tokens, "loss": loss} for tokens, loss in points]


def power_law(rate, steps, shift=1.0):
    """A run whose loss is 10 (shift * tokens)^-rate, evaluated at `steps`."""
    return run(*((tokens, 10 * (shift * tokens) ** -rate) for tokens in steps))


def test_the_saving_of_a_run_that_is_a_known_share_ahead():
    steps = [100 * 1.05**i for i in range(80)]
    found = saving(power_law(0.2, steps, shift=1 / (1 - 0.215)), power_law(0.2, steps))
    assert found.share == pytest.approx(0.215, abs=2e-3)
    assert found.low < 0.215 < found.high and found.high - found.low < 0.1
    behind = saving(power_law(0.2, steps, shift=0.5), power_law(0.2, steps))
    assert behind.share == pytest.approx(-1.0, abs=5e-3) and behind.low < -1 < behind.high


def test_it_is_taken_at_the_better_loss_that_both_reached():
    found = saving(run((10, 5.0), (20, 4.0), (40, 3.0)), run((10, 5.0), (20, 4.5), (80, 3.5)))
    assert found.loss == 3.5 and found.baseline_tokens == 80
    assert found.tokens == pytest.approx(math.sqrt(20 * 40))
    assert found.share == pytest.approx(1 - math.sqrt(800) / 80)
    assert (found.low, found.high) == (1 - 40 / 80, 1 - 20 / 80)


def test_nobody_knows_when_a_loss_was_reached_that_the_first_evaluation_was_past():
    slow, fast = run((100, 6.3), (800, 6.2)), run((100, 5.3), (800, 4.1))
    assert saving(slow, fast) is None and saving(fast, slow) is None
    assert saving(slow, run((100, 6.2), (800, 4.1))).baseline_tokens == 100


def test_equal_runs_save_nothing_and_short_ones_say_nothing():
    same = [(10, 5.0), (20, 4.0)]
    assert saving(run(*same), run(*same)).share == 0
    assert saving(run((10, 5.0)), run(*same)) is None
    assert saving(run((5, math.nan), (10, 5.0), (20, math.nan)), run(*same)) is None


def test_a_saving_in_tokens_is_one_in_cost_where_tokens_cost_the_same():
    found = Saving(loss=4.0, tokens=80, baseline_tokens=100, share=0.2, low=0.1, high=0.3)
    assert found.at_cost(1.0) == pytest.approx(0.2) and found.at_cost(1.25) == pytest.approx(0.0)
    assert found.at_cost(1.5) == pytest.approx(-0.2)


@given(st.lists(st.floats(1, 9), min_size=2, max_size=6), st.lists(st.floats(1, 9), min_size=2, max_size=6))
def test_the_saving_lies_within_its_bounds_whatever_the_curves(losses, others):
    found = saving(*(run(*((10 * (i + 1), loss) for i, loss in enumerate(values))) for values in (losses, others)))
    if max(losses[0], others[0]) > max(min(losses), min(others)) > min(losses[0], others[0]):
        assert found is None
    else:
        assert found is None or found.low - 1e-9 <= found.share <= found.high + 1e-9


def arm(**curves):
    """Curves by seed."""
    return SimpleNamespace(has_budgets=False, curves=curves, evaluations=next(iter(curves.values())))


def test_each_seed_is_compared_with_the_same_seed_of_the_baseline():
    steps = [100 * 1.05**i for i in range(80)]
    curves = {"0": power_law(0.2, steps), "1": power_law(0.2, steps, shift=0.8)}
    ahead = {"0": power_law(0.2, steps, shift=1 / 0.9), "1": power_law(0.2, steps, shift=0.8 / 0.7)}
    found = arm_saving(arm(**ahead), arm(**curves))
    assert found.of_seeds == pytest.approx((0.1, 0.3), abs=3e-3)
    assert found.share == pytest.approx(0.2, abs=3e-3)
    single = [saving(ahead[seed], curves[seed]) for seed in curves]
    assert (found.low, found.high) == (min(one.low for one in single), max(one.high for one in single))


def test_a_seed_that_the_baseline_lacks_is_compared_with_its_mean():
    steps = [100 * 1.05**i for i in range(80)]
    ntp = arm(**{"0": power_law(0.2, steps)})
    found = arm_saving(arm(**{"7": power_law(0.2, steps, shift=2)}), ntp)
    assert found == saving(power_law(0.2, steps, shift=2), ntp.evaluations) and found.of_seeds == ()


def test_there_is_no_saving_where_one_seed_tells_none():
    fine = run((10, 5.0), (20, 4.0))
    assert arm_saving(arm(**{"0": fine, "1": run((10, 5.0))}), arm(**{"0": fine, "1": fine})) is None
