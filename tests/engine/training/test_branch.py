"""Runs that begin with a checkpoint of another one."""

import json
import re
import zlib

import pytest
from run_helpers import SEQ_LEN, STEPS, assert_equal_runs, stage, stop_at, uneven

from cocomix.report.runs import load_run
from cocomix.training.trainer import EXIT_RESUME

STABLE = ["train.schedule=wsd", "train.decay_share=0.25", "train.keep_checkpoints=9"]
LONG = f"train.tokens={2 * STEPS * 8 * SEQ_LEN}"  # decays from step 18 on, the others from step 9


def long_run(world, *overrides) -> str:
    """A run of twice the tokens, made once for each of the settings; its name."""
    name = f"stable-{zlib.crc32(' '.join(overrides).encode())}"
    if not (world.folder / name / "model").exists():
        assert world.train(name, *uneven(world), *STABLE, LONG, *overrides) == 0
    return name


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_shorter_budget_begins_with_a_longer_run_and_ends_as_if_it_had_trained_alone(world, zero_stage, capsys):
    source = long_run(world, *stage(zero_stage))
    run, alone = f"branch-{zero_stage}", f"alone-{zero_stage}"
    assert world.train(run, *uneven(world), *STABLE, *stage(zero_stage), branch_from=source) == 0
    assert f"begins after step 8 of {world.folder / source}" in capsys.readouterr().out
    assert world.train(alone, *uneven(world), *STABLE, *stage(zero_stage)) == 0
    assert_equal_runs(world, run, alone)
    assert [line["step"] for line in world.records(run, "train")] == list(range(1, STEPS + 1))
    record = json.loads((world.folder / run / "run.json").read_text())
    assert record["branched_from"] == {"run": str(world.folder / source), "step": 8}
    assert load_run(world.folder / run).summary["step"] == STEPS


@pytest.mark.slow
def test_two_ranks_branch_as_one_does(world):
    settings = [*uneven(world), *STABLE, "train.micro_batch=2"]
    runs = {
        "source-on-two": [*settings, LONG],
        "branch-on-two": [*settings, "--branch-from", str(world.folder / "source-on-two")],
        "alone-on-two": settings,
    }
    world.train_on(2, runs)
    assert_equal_runs(world, "branch-on-two", "alone-on-two")
    assert load_run(world.folder / "branch-on-two").record.branched_from.step == 8


def test_an_interrupted_branch_goes_on_where_it_stopped(world, monkeypatch):
    source = long_run(world)
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        assert world.train("cut", *uneven(world), *STABLE, branch_from=source) == EXIT_RESUME
    assert world.train("cut", *uneven(world), *STABLE, branch_from=source, resume=True) == 0
    assert world.train("whole", *uneven(world), *STABLE, branch_from=source) == 0
    assert_equal_runs(world, "cut", "whole")
    assert load_run(world.folder / "cut").record.branched_from == load_run(world.folder / "whole").record.branched_from


def test_a_constant_rate_serves_every_budget(world):
    source = long_run(world, "train.schedule=constant")
    assert world.train("of-constant", *uneven(world), *STABLE, branch_from=source) == 0
    assert world.train("alone-wsd", *uneven(world), *STABLE) == 0
    assert_equal_runs(world, "of-constant", "alone-wsd")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([*STABLE, "train.lr=2e-3"], "no checkpoint of .* was reached by the learning rates of this run"),
        ([*STABLE, "train.warmup_steps=4"], "no checkpoint of .* was reached by the learning rates of this run"),
        ([*STABLE, "train.tokens=128"], "no checkpoint of .* was reached by the learning rates of this run"),
        ([*STABLE, "train.seed=1"], "cannot be resumed: train.seed was 0 and is 1"),
        ([*STABLE, "model.concept_residual=true"], "cannot be resumed: model.concept_residual"),
    ],
)
def test_what_would_not_be_the_same_run_is_refused(world, overrides, message, capsys):
    source = long_run(world)
    capsys.readouterr()
    assert world.train("refused", *uneven(world), *overrides, branch_from=source) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(message, error), error
    assert not (world.folder / "refused").exists()


def test_where_a_run_began_is_not_forgotten_or_changed(world, capsys):
    source, other = long_run(world), long_run(world, "train.schedule=constant")

    def error(run, **options):
        assert world.train(run, *uneven(world), *STABLE, **options) == 2
        return capsys.readouterr().err

    assert "cannot begin with a checkpoint of its own" in error("self", branch_from="self")
    assert "has no complete checkpoint to begin with" in error("nothing", branch_from="nowhere")
    assert world.train("from-source", *uneven(world), *STABLE, branch_from=source) == 0
    wrong = dict(branch_from=other, resume=True)
    for path in (world.folder / "from-source/model").iterdir():
        path.unlink()  # or it would be finished
    assert f"began with a checkpoint of {world.folder / source}, not of" in error("from-source", **wrong)
    assert world.train("from-scratch", *uneven(world), *STABLE) == 0
    for path in (world.folder / "from-scratch/model").iterdir():
        path.unlink()
    assert "did not begin with a checkpoint of" in error("from-scratch", **wrong)


def test_a_branch_that_was_killed_before_its_first_save_does_not_start_over(world, capsys):
    source = long_run(world)
    run = world.folder / "killed"
    assert world.train("killed", *uneven(world), *STABLE, branch_from=source) == 0
    for folder in ("checkpoints", "model"):
        (run / folder).rename(run / f"gone-{folder}")
    assert world.train("killed", *uneven(world), *STABLE, resume=True) == 2
    assert f"began with a checkpoint of {world.folder / source}: pass --branch-from" in capsys.readouterr().err
    assert world.train("killed", *uneven(world), *STABLE, branch_from=source, resume=True) == 0
