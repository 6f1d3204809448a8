"""The short form of `kill_runs.py`, and whether its checks would notice what they are there for."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import kill_readers
import numpy as np
import pytest
from kill_commands import Data, Export, Page, Sae
from kill_pairs import Pair
from kill_readers import READERS, Readers
from kill_runs import STORIES, tell_all
from kill_stories import SAVED_EXIT, Counts, Kill, Labels, Lost, Training
from run_helpers import environment
from safetensors.numpy import save_file

PROGRAM = Path(__file__).parents[2] / "helpers" / "kill_runs.py"


@pytest.mark.slow
def test_nothing_is_lost_whatever_is_killed(tmp_path):
    """Each story once, with a kill or none."""
    found = tmp_path / "kills.json"
    done = subprocess.run(
        [sys.executable, PROGRAM, "--kills", str(len(STORIES)), "--ranks", "2", "--json", found],
        env=environment(threads=1),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kills on 2 ranks (seed 0)" in done.stdout and "nothing lost" in done.stdout
    figures = json.loads(found.read_text())
    assert figures["stories"].keys() == set(STORIES) and figures["lost"] is None
    assert all(count["finished"] >= 1 for count in figures["stories"].values())
    assert sum(count.get("kills", 0) for count in figures["stories"].values()) == figures["kills"] >= len(STORIES)
    assert figures["beside_one_another"] and figures["moments"] and figures["commit"]


@pytest.mark.parametrize("kills", [0, 7, 40])
def test_all_stories_have_their_turn(kills):
    class Teller:
        told: list[str] = []
        counts = Counts()

        def tell(self, name, most_kills):
            self.told.append(name)
            self.counts.of_story[name]["kills"] += most_kills

    Teller.told, Teller.counts = [], Counts()
    tell_all(Teller(), STORIES, kills, random.Random(0))
    assert Teller.counts.kills == kills
    assert sorted(Teller.told[: len(STORIES)]) == sorted(STORIES) != STORIES
    assert len(Teller.told) == len(STORIES) if kills < len(STORIES) else len(Teller.told) > len(STORIES)


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
    return Training(
        "train", tmp_path / "config.yaml", tmp_path / "run", [], tmp_path / "reference", Counts(), exact=True
    )


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


# --- the checks of commands in one process


@pytest.fixture
def written(tmp_path):
    """What makes a story whose reference is two files in a folder."""

    def make(kind, **files):
        for folder in ("reference", "story", "older"):
            (tmp_path / folder / "out").mkdir(parents=True)
        for name, content in {"a": "new", "meta.json": "{}"}.items():
            (tmp_path / "reference/out" / name).write_text(content)
        for name, content in files.items():
            (tmp_path / "story/out" / name.replace("_", ".")).write_text(content)
        (tmp_path / "older/out/a").write_text("old")
        more = [tmp_path / "older"] if kind is Page else []
        (tmp_path / "story.log").write_text("")
        return kind("it", tmp_path / "story", ["data"], tmp_path / "reference", Counts(), *more)

    return make


@pytest.mark.parametrize(
    "kind, files, problem",
    [
        (Data, {"a": "ne", "meta_json": "{}"}, "has its meta.json and is not the reference"),
        (Data, {"meta_json": "{}"}, "has its meta.json and is not the reference"),
        (Sae, {"a": "new"}, "holds an SAE that is not the reference's"),
        (Export, {"a": "new"}, "holds an export that is not the reference"),
        (Page, {"a": "ol"}, "a is neither the older one nor the new one"),
        (Page, {}, "had {'out/a'}"),
    ],
)
def test_what_is_half_there_is_found(written, kind, files, problem):
    with pytest.raises(Lost, match=problem):
        written(kind, **files).after_kill(Ended(), kill())


def test_what_is_absent_older_or_whole_passes(written):
    story = written(Page, a="old", meta_json="{}")
    assert story.after_kill(Ended(), kill()) == "it: written"
    (story.folder / "out/a").write_text("new")
    (story.folder / "out/.a.0123.4711.part").write_text("ne")
    assert story.after_kill(Ended(), kill()) == "it: half-written"
    with pytest.raises(Lost, match=r"\.a\.0123\.4711\.part'\] stay behind"):
        story.when_done()
    (story.folder / "out/.a.0123.4711.part").unlink()
    story.when_done()


def test_a_command_that_was_told_to_stop_and_left_something_is_found(written):
    story = written(Data)
    (story.folder / "out/.a.0123.4711.part").write_text("ne")
    with pytest.raises(Lost, match="was told to stop, did so, and left"):
        story.after_kill(Ended(130), kill(signal.SIGTERM))


def test_an_sae_that_goes_back_or_starts_afresh_is_found(written):
    story = written(Sae, a="new", meta_json="{}")
    story.log.write_text("going on from x.partial.pt at step 8 of 16\ngoing on from x.partial.pt at step 6 of 16\n")
    with pytest.raises(Lost, match="had come to step 8 and went on from 6"):
        story.when_done()
    story = written_again(story, "x.partial.pt belongs to other settings: starting afresh\n")
    with pytest.raises(Lost, match="starts afresh"):
        story.when_done()


def written_again(story, log):
    story.log.write_text(log)
    story._step = story._length = 0
    return story


def test_of_two_only_a_refusal_in_one_line_passes(written):
    pair = Pair("two", written(Data), False, lambda: 0)
    refusal = "cocomix data: error: x is being written by cocomix data (process 1 on y): wait for it\n"
    assert pair._outcome(Ended(0), "") == "done" and pair._outcome(Ended(2), refusal * 2) == "refused"
    for ended, said in [
        (Ended(2), "cocomix data: error: x is damaged\n" * 2),
        (Ended(1), refusal * 2),
        (Ended(2), refusal),
        (Ended(2), refusal * 2 + "Traceback (most recent call last)"),
    ]:
        with pytest.raises(Lost, match="of two, one ended with"):
            pair._outcome(ended, said)


@pytest.mark.parametrize(
    "code, said, problem",
    [
        (0, "x: validation loss 2.1\n", None),
        (0, "x: validation loss 2.2\n", "read what is in no checkpoint"),
        (2, "cocomix eval: error: x holds no model: expected\n", None),
        (2, "cocomix eval: error: x is damaged\n", "eval ended with"),
        (2, "cocomix eval: error: x holds no model\ncocomix eval: error: x holds no model\n", "eval ended with"),
        (1, "Traceback (most recent call last):\n", "eval ended with"),
    ],
)
def test_a_reader_must_tell_the_truth_or_that_there_is_nothing_yet(story, monkeypatch, code, said, problem):
    class Reader(Ended):
        def __init__(self, arguments, n_ranks, log):
            self.codes = {0: code}
            log.write_text(said)

        def wait(self, *_):
            pass

        def living(self):
            return []

    monkeypatch.setattr(kill_readers, "Launch", Reader)
    true = kill_readers.fingerprint("eval", "x: validation loss 2.1\n", story.folder, story.folder / "nothing")
    readers = Readers("readers", story, dict.fromkeys(READERS, {true}), random.Random(0))
    if problem is None:
        readers._read("eval", lambda: False)
        assert list(story.counts.outcomes) == ["eval: true" if code == 0 else "eval: nothing yet"]
        return
    with pytest.raises(Lost, match=problem):
        readers._read("eval", lambda: False)
