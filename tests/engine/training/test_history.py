"""No run is started over by accident."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from run_helpers import STEPS, assert_equal_runs, environment, stop_at

from cocomix.core.errors import CocomixError
from cocomix.distributed import checkpoint
from cocomix.distributed.checkpoint import complete_checkpoints
from cocomix.training.trainer import EXIT_RESUME

ONE = ["model.mixing=none"]


@pytest.fixture
def run(world):
    """A finished run, as a copy of its own for each test: its name."""
    if not (world.folder / "finished/model").exists():
        assert world.train("finished", *ONE) == 0
    name = f"run-{len(list(world.folder.iterdir()))}"
    shutil.copytree(world.folder / "finished", world.folder / name, symlinks=True)
    return name


def unfinished(world, run) -> str:
    shutil.rmtree(world.folder / run / "model")
    return run


def lose(folder, how):
    """Make checkpoints unreachable in one of the ways that happen."""
    if how == "deleted":
        shutil.rmtree(folder)
    elif how == "emptied":
        for entry in folder.iterdir():
            shutil.rmtree(entry)
    elif how == "cut":
        for entry in folder.iterdir():
            (entry / "trainer.json").unlink()
    elif how == "dangling":
        shutil.rmtree(folder)
        folder.symlink_to("/nonexistent/disk")
    elif how == "file":
        shutil.rmtree(folder)
        folder.write_text("")


LOSSES = ["deleted", "emptied", "cut", "dangling", "file"]


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("how", LOSSES)
def test_a_run_whose_checkpoints_are_gone_is_not_started_over(world, run, how, resume, capsys):
    unfinished(world, run)
    lose(world.folder / run / "checkpoints", how)
    before = (world.folder / run / "metrics.jsonl").read_bytes()
    assert world.train(run, *ONE, resume=resume) == 2
    error = capsys.readouterr().err
    reasons = {"dangling": "leads to /nonexistent/disk, which is not there", "file": "cannot be listed"}
    expected = reasons.get(how, f"has trained for {STEPS} steps, but no complete checkpoint to go on from is in")
    assert len(error.splitlines()) == 1 and expected in error, error
    assert (world.folder / run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("how", LOSSES[:3])
def test_a_finished_run_whose_checkpoints_were_deleted_stays_finished(world, run, how, capsys):
    lose(world.folder / run / "checkpoints", how)
    weights = world.weights(run)
    assert world.train(run, *ONE, resume=True) == 0
    assert "is finished" in capsys.readouterr().out
    assert world.train(run, *ONE) == 2
    assert "holds a finished model, but no complete checkpoint" in capsys.readouterr().err
    assert world.train(run, *ONE, "train.tokens=4096", resume=True) == 2
    assert "holds a finished model, but no complete checkpoint" in capsys.readouterr().err
    assert all((tensor == weights[name]).all() for name, tensor in world.weights(run).items())


def test_a_folder_that_may_not_be_read_is_not_an_empty_one(world, run, monkeypatch, capsys):
    """Permission, or a disk that fails: as root one may read everything, so the system's refusal is a stand-in."""
    unfinished(world, run)
    listed = os.listdir

    def refuse(path):
        if str(path).endswith("checkpoints"):
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(checkpoint.os, "listdir", refuse)
    assert world.train(run, *ONE, resume=True) == 2
    assert "checkpoints cannot be listed: Permission denied" in capsys.readouterr().err
    with pytest.raises(CocomixError, match="cannot be listed"):
        complete_checkpoints(world.folder / run)


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_that_was_killed_before_its_first_save_was_complete_starts_over(world, run, step):
    folder = unfinished(world, run)
    lose(world.folder / folder / "checkpoints", "deleted")
    path = world.folder / folder / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
    path.write_text("\n".join(lines) + "\n")
    assert world.train(folder, *ONE, resume=True) == 0
    assert_same(world, folder)


def test_a_run_that_was_killed_in_its_first_save_starts_over(world, run, capsys):
    folder = unfinished(world, run)
    for entry in (world.folder / folder / "checkpoints").iterdir():
        shutil.rmtree(entry)
    (world.folder / folder / "checkpoints/step-00000004/state").mkdir(parents=True)
    path = world.folder / folder / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= 6]
    path.write_text("\n".join(lines) + "\n")
    assert world.train(folder, *ONE, resume=True) == 0
    assert "step-00000004 is incomplete, since its save was cut off: passed over" in capsys.readouterr().out
    assert_same(world, folder)


def test_a_save_that_was_cut_off_is_passed_over_and_said(world, run, monkeypatch, capsys):
    folder = unfinished(world, run)
    newest = world.folder / folder / f"checkpoints/step-{STEPS:08d}"
    next((newest / "state").iterdir()).unlink()
    assert world.train(folder, *ONE, resume=True) == 0
    assert f"{newest} is incomplete, since its save was cut off: passed over" in capsys.readouterr().out
    assert_same(world, folder)


def test_lines_of_metrics_that_are_damaged_are_left_out_and_counted(world, run, monkeypatch, capsys):
    name = f"{run}-cut"
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert world.train(name, *ONE) == EXIT_RESUME
    path = world.folder / name / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"\xff" + lines[1]
    lines[3] = b'{"kind": "train", "step": "4", "tokens": 512}\n'
    lines.insert(5, b"[" * 100_000 + b"\n")
    lines.insert(6, b"[1, 2]\n")
    path.write_bytes(b"".join(lines) + b'{"kind": "tra')
    assert world.train(name, *ONE, resume=True) == 0
    assert f"{path}: left out 4 damaged lines, the first is line 2" in capsys.readouterr().err
    steps = [line["step"] for line in world.records(name)]
    assert steps == [1, 3, *range(5, STEPS + 1)]


def assert_same(world, run):
    assert_equal_runs(world, run, "finished")


@pytest.mark.slow
def test_a_run_that_another_process_finishes_between_two_looks_holds_up_no_rank(world, tmp_path):
    """The second rank, which looks later, sees it finished; the first one has not, and would wait for the other."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\nfrom cocomix.cli import main\nfrom cocomix.training import trainer\n"
        "if os.environ['RANK'] == '1':\n    trainer.is_finished = lambda *_: True\nsys.exit(main(sys.argv[1:]))\n"
    )
    command = ["train", str(world.config), f"train.run={world.folder / 'looked'}", *ONE, "--resume"]
    done = subprocess.run(
        [Path(sys.executable).with_name("torchrun"), "--nproc-per-node", "2", program, *command],
        env=environment(threads=1),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(world.losses("looked")) == STEPS
