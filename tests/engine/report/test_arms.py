"""Seeds and budgets of one method as one line of the comparison."""

import json
import math

import numpy as np
import pytest
from run_files import write_run

from cocomix.report import figures
from cocomix.report.arms import arm_titles, arms
from cocomix.report.report import comparison_table, write_report
from cocomix.report.runs import load_run


def seeded(folder, seed, mode="none", steps=200, *, offset=0.0, **settings):
    """A run with a seed and further training settings."""
    path = write_run(folder / f"{mode}-{seed}-{steps}-{len(list(folder.iterdir()))}", mode, steps, offset=offset)
    record = json.loads((path / "run.json").read_text())
    record["config"]["train"] |= {"seed": seed, "tokens": steps * 4096} | settings
    (path / "run.json").write_text(json.dumps(record))
    return load_run(path)


@pytest.fixture
def seeds(tmp_path):
    """Three seeds of two methods."""
    ntp = [seeded(tmp_path, seed, offset=0.01 * seed) for seed in range(3)]
    return ntp, [seeded(tmp_path, seed, "interleave", offset=0.01 * seed - 0.1) for seed in range(3)]


def test_seeds_of_a_method_are_one_arm_whose_curve_is_their_mean_with_its_ends(seeds):
    ntp, mixed = arms([*seeds[0], *seeds[1]])
    assert arm_titles([ntp, mixed]) == ["NTP, 3 seeds", "CoCoMix (cached labels), 3 seeds"]
    for at, record in enumerate(ntp.evaluations):
        losses = [run.evaluations[at]["loss"] for run in seeds[0]]
        assert record["tokens"] == seeds[0][0].evaluations[at]["tokens"]
        assert record["loss"] == pytest.approx(sum(losses) / 3)
        assert (record["loss_low"], record["loss_high"]) == (min(losses), max(losses))
    assert ntp.tokens_per_s == seeds[0][0].tokens_per_s and ntp.peak_memory_gib == 1.25
    assert mixed.train[5]["concept_loss"] == pytest.approx(seeds[1][0].train[5]["concept_loss"])


@pytest.mark.parametrize(("after", "lines"), [(0, 2), (4096, 1)])
def test_seeds_that_teach_themselves_have_teachers_of_their_own_and_are_one_arm(tmp_path, after, lines):
    runs = []
    for seed in (0, 1):
        path = seeded(tmp_path, seed, "interleave").folder
        record = json.loads((path / "run.json").read_text())
        record["config"]["teacher"] = {"model": f"{path}/first/model", "sae": f"{path}/sae", "self_taught_after": after}
        (path / "run.json").write_text(json.dumps(record))
        runs.append(load_run(path))
    assert len(arms(runs)) == lines


def test_evaluations_that_a_seed_lacks_are_left_out(tmp_path):
    runs = [seeded(tmp_path, seed) for seed in (0, 1)]
    del runs[1].evaluations[1]
    [arm] = arms(runs)
    assert [record["tokens"] for record in arm.evaluations] == [e["tokens"] for e in runs[1].evaluations]


def test_seeds_without_evaluations_at_equal_tokens_stay_apart(tmp_path):
    runs = [seeded(tmp_path, 0, steps=150), seeded(tmp_path, 1, steps=200)]
    assert [arm.runs for arm in arms(runs)] == [(run,) for run in runs]


def test_the_arithmetic_of_budgets_is_that_of_the_runs_that_end_there(tmp_path):
    runs = [seeded(tmp_path, 0, "interleave", steps) for steps in (50, 100, 200)]
    [arm] = arms(runs)
    token = runs[0].record.flops_per_token
    assert [arm.flops(steps * 4096) for steps in (50, 75, 200)] == [steps * 4096 * token for steps in (50, 75, 200)]
    assert arm.flops(25 * 4096) == 25 * 4096 * token
    [arm] = arms([*runs[1:], seeded(tmp_path, 1, "interleave", 50), seeded(tmp_path, 1, "interleave", 200)])
    assert arm.flops(50 * 4096) == 50 * 4096 * token  # a budget that the first seed lacks
    path = runs[1].folder / "run.json"  # one that began with a cheaper student
    record = json.loads(path.read_text())
    record["branched_from"] = {"run": "ntp", "step": 40, "flops": [[0, 0], [40 * 4096, 40 * 4096 * token / 2]]}
    path.write_text(json.dumps(record))
    [arm] = arms([runs[0], load_run(runs[1].folder), runs[2]])
    assert arm.flops(100 * 4096) == 80 * 4096 * token and arm.flops(75 * 4096) == 65 * 4096 * token


def test_ends_of_several_budgets_are_not_compared_with_one_runs_way(tmp_path):
    ntp = [seeded(tmp_path, 0, steps=steps) for steps in (100, 200)]
    table = comparison_table([*ntp, seeded(tmp_path, 0, "interleave", offset=-0.1)])
    assert "were not both trained for several budgets: no saving in tokens is told." in table
    assert "reaches a validation loss" not in table


def test_budgets_are_one_arm_whose_curve_is_their_ends(tmp_path):
    runs = [seeded(tmp_path, seed, steps=steps, offset=0.1 * seed) for steps in (200, 100) for seed in (0, 1)]
    [arm] = arms(runs)
    assert arm.title == "NTP, 2 seeds, 2 budgets"
    ends = {
        seed: [run.evaluations[-1] for run in runs if run.record.config["train"]["seed"] == seed] for seed in (0, 1)
    }
    assert arm.curves == {seed: list(reversed(found)) for seed, found in ends.items()}
    assert [record["tokens"] for record in arm.evaluations] == [100 * 4096, 200 * 4096]
    assert arm.train == runs[0].train


def test_a_budget_that_has_not_finished_has_no_end_yet(tmp_path):
    runs = [seeded(tmp_path, 0, steps=steps) for steps in (100, 150, 200)]
    object.__setattr__(runs[2], "summary", None)
    done, running = arms(runs)
    assert done.evaluations == [run.evaluations[-1] for run in runs[:2]]
    assert running.evaluations == runs[2].evaluations
    assert len(set(arm_titles([done, running]))) == 2


def test_what_differs_in_more_than_seed_and_budget_stays_apart(tmp_path):
    runs = [
        seeded(tmp_path, 0),
        seeded(tmp_path, 1, lr=1e-3),
        seeded(tmp_path, 2, log_every=3),  # which leaves the trajectory alone
        seeded(tmp_path, 0, "interleave"),
    ]
    assert [arm.runs for arm in arms(runs)] == [(runs[0], runs[2]), (runs[1],), (runs[3],)]


def test_a_repeated_run_stays_apart(tmp_path):
    runs = [seeded(tmp_path, 0), seeded(tmp_path, 0), seeded(tmp_path, 1)]
    assert [arm.runs for arm in arms(runs)] == [(run,) for run in runs]


def test_the_table_has_a_row_for_all_seeds_with_the_best_and_the_worst(seeds):
    table = comparison_table([*seeds[0], *seeds[1]])
    assert "Validation perplexity after 819,200 training tokens" in table
    row = next(line for line in table.splitlines() if line.startswith("CoCoMix"))
    losses = [run.evaluations[-1]["loss"] for run in seeds[1]]
    mean, low, high = (f"{math.exp(loss):.2f}" for loss in (np.mean(losses), min(losses), max(losses)))
    assert f" {mean}  {low} – {high} " in row
    assert "by seed, between" in table and "What other seeds would give" not in table


def test_a_single_run_says_that_other_seeds_are_not_in_its_bounds(seeds):
    table = comparison_table([*seeds[0], seeds[1][0]])
    assert "What other seeds would give is not in these bounds." in table
    row = next(line for line in table.splitlines() if line.startswith("CoCoMix"))
    assert " – " in row  # it has no spread


def test_curves_have_a_band_where_there_are_seeds(seeds, tmp_path):
    compared = arms([*seeds[0], seeds[1][0]])
    for draw in (
        figures.validation_loss_over_tokens,
        figures.validation_loss_over_time,
        figures.validation_loss_over_flops,
    ):
        axes = draw(compared).axes[0]
        [band] = axes.collections
        low, high = (np.array([e[key] for e in compared[0].evaluations]) for key in ("loss_low", "loss_high"))
        points = band.get_paths()[0].vertices
        assert set(np.round(points[:, 1], 9)) >= set(np.round([*low, *high], 9))
    page = write_report([*seeds[0], *seeds[1]], tmp_path / "out").read_text()
    assert "CoCoMix (cached labels), 3 seeds" in page


def test_what_one_seed_wins_and_another_loses_is_not_told(tmp_path):
    ntp = [seeded(tmp_path, seed) for seed in (0, 1)]
    mixed = [seeded(tmp_path, seed, "interleave", offset=offset) for seed, offset in ((0, -0.05), (1, 0.05))]
    assert "Worth it here: in tokens not told by these seeds, in arithmetic no" in comparison_table([*ntp, *mixed])
