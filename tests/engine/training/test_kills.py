"""The short form of `kill_runs.py`, and whether its checks would notice what they are there for."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kill_runs import SAVED_EXIT, Counts, Kill, Labels, Lost, Training
from run_helpers import environment
from safetensors.numpy import save_file

PROGRAM = Path(__file__).parents[2] / "helpers" / "kill_runs.py"


@pytest.mark.slow
def test_nothing_is_lost_when_ranks_are_killed():
    done = subprocess.run(
        [sys.executable, PROGRAM, "--kills", "8", "--ranks", "2"],
        env=environment(threads=1),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 kills on 2 ranks (seed 0)" in done.stdout and "nothing lost" in done.stdout
    assert "finished like those that nobody killed: label caches 2, training runs 6" in done.stdout


# --- the checks


def write_run(folder, steps, newest=(), loss=2.0):
    """A run's files as training leaves them: lines up to `steps`, checkpoints of two ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [{"kind": "train", "step": step, "loss": loss + step / 7, "lr": 0.1} for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for step in newest:
        state = folder / "checkpoints" / f"step-{step:08d}" / "state"
        state.mkdir(parents=True)
        (state.parent / "trainer.json").write_text(json.dumps({"version": 3, "world_size": 2, "step": step}))
        for rank in range(2):
            save_file({"x": np.zeros(3, "f4")}, state / f"rank-{rank:05d}-of-00002.safetensors", {"save_id": "s"})
    (folder / "model").mkdir(exist_ok=True)
    save_file({"w": np.arange(4, dtype="f4")}, folder / "model" / "model.safetensors")


class Ended:
    """A launch whose ranks have ended."""

    def __init__(self, code=-9):
        self.codes = {0: code, 1: code}


def kill(number=signal.SIGKILL):
    return Kill("training", 1, 0, number, None, 0, 0)


@pytest.fixture
def story(tmp_path):
    write_run(tmp_path / "reference", 24)
    write_run(tmp_path / "run", 6, [4])
    return Training(tmp_path / "config.yaml", tmp_path / "run", [], tmp_path / "reference", Counts(), exact=True)


def test_a_run_that_has_lost_nothing_passes(story):
    assert story.after_kill(Ended(), kill()) == "training"
    assert story.counts.repeated == [2]
    assert story.after_kill(Ended(), kill()) == "start-up"
    shutil.rmtree(story.folder)
    write_run(story.folder, 24)
    story.when_done()


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def rank_file(folder):
    return folder / "checkpoints/step-00000004/state/rank-00001-of-00002.safetensors"


@pytest.mark.parametrize(
    "harm, problem",
    [
        (lambda run: write_run(run, 6, loss=2.0000001), "is not"),
        (lambda run: write_run(run, 13), "step 13 was logged, and 4 is the newest"),
        (lambda run: truncate(rank_file(run)), "cannot be opened"),
        (lambda run: save_file({"x": np.zeros(3, "f4")}, rank_file(run), {"save_id": "t"}), "files of 2 saves"),
        (lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() * 2), "logged twice"),
        (
            lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().partition("\n")[2]),
            "logged steps",
        ),
    ],
)
def test_what_a_kill_has_cost_is_found(story, harm, problem):
    harm(story.folder)
    with pytest.raises(Lost, match=problem):
        story.after_kill(Ended(), kill())


def test_a_checkpoint_that_has_gone_and_one_that_was_not_taken_are_found(story):
    story.after_kill(Ended(), kill())
    lines = (story.folder / "metrics.jsonl").read_text()
    (story.folder / "metrics.jsonl").write_text(lines.replace('"lr": 0.1}', '"lr": 0.1, "elapsed_s": 7}', 3))
    with pytest.raises(Lost, match="step 1 came before the newest checkpoint, 4, and was repeated"):
        story.after_kill(Ended(), kill())
    (story.folder / "metrics.jsonl").write_text(lines)
    rank_file(story.folder).unlink()
    with pytest.raises(Lost, match="the newest checkpoint was step 4, is 0"):
        story.after_kill(Ended(), kill())


def test_a_stop_that_was_asked_for_must_save_the_last_step(story):
    with pytest.raises(Lost, match="SIGTERM came at step 6 but step 4 was saved"):
        story.after_kill(Ended(SAVED_EXIT), kill(signal.SIGTERM))


def test_another_weight_and_a_missing_line_are_found_in_the_end(story):
    with pytest.raises(Lost, match="metrics.jsonl has"):
        story.when_done()
    write_run(story.folder, 24)
    save_file({"w": np.float32([0, 1, 2, 3.0000002])}, story.folder / "model" / "model.safetensors")
    with pytest.raises(Lost, match="w differs from the reference"):
        story.when_done()


def test_a_shard_that_is_not_the_references_is_found(tmp_path):
    for folder in ("reference", "cache"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "labels-000000.bin").write_bytes(b"labels")
    story = Labels(tmp_path / "config.yaml", tmp_path / "cache", tmp_path / "reference", Counts())
    (tmp_path / "cache" / ".labels-000001.bin.0123.4711.part").write_bytes(b"half")
    assert story.after_kill(Ended(), kill()) == "labels"
    (tmp_path / "cache" / "labels-000000.bin").write_bytes(b"label")
    with pytest.raises(Lost, match=r"labels-000000\.bin is not the reference's"):
        story.after_kill(Ended(), kill())
