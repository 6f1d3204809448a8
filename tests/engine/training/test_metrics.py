import errno
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from run_helpers import STEPS, stop_at
from stored_json import change_json

from cocomix.core.checksums import of_value
from cocomix.core.config import TrainConfig
from cocomix.core.errors import CocomixError
from cocomix.training.metrics import MetricsLog, peak_memory_gib, progress_bar, read_metrics

TRAIN = {"ntp_loss": 3.0, "step_time_s": 0.5, "tokens_per_s": 256.0, "peak_memory_gib": 1.5}


def open_log(folder, from_step=0, **settings):
    return MetricsLog(folder, TrainConfig(**{"tensorboard": False, **settings}), from_step, {})


def fill(folder, steps, **settings):
    log = open_log(folder, **settings)
    for step in range(1, steps + 1):
        log.write("train", step, step * 128, **TRAIN | {"peak_memory_gib": float(step)})
        if step % 2 == 0:
            log.write("eval", step, step * 128, loss=2.0, perplexity=7.4, elapsed_s=1.0)
    log.write("summary", steps, steps * 128, loss=2.0)
    log.close()


def lines(folder):
    return [
        (record["kind"], record["step"])
        for record in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    ]


def test_every_line_is_one_object_with_kind_step_and_tokens(tmp_path):
    log = open_log(tmp_path / "new" / "run")
    log.write("train", 3, 384, loss=1.5, concept_loss=None)
    written = (tmp_path / "new/run/metrics.jsonl").read_text()  # before it is closed
    values = '{"kind": "train", "step": 3, "tokens": 384, "loss": 1.5, "concept_loss": null}'
    assert written == f'{values[:-1]}, "crc32": "{of_value(json.loads(values))}"}}\n'
    log.close()


def test_a_line_whose_checksum_does_not_hold_is_left_out_and_said(tmp_path, capsys):
    fill(tmp_path, 6)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('"step_time_s": 0.5', '"step_time_s": 0.4', 1))
    assert [record["step"] for record in read_metrics(path) if record["kind"] == "train"] == [2, 3, 4, 5, 6]
    assert f"{path}: left out 2 damaged lines, the first is line 1" in capsys.readouterr().err  # and the bare summary


def test_lines_of_earlier_versions_have_no_checksum(tmp_path, capsys):
    line = json.dumps({"kind": "train", "step": 1, "tokens": 128, **TRAIN}) + "\n"
    (tmp_path / "metrics.jsonl").write_text(line)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1]
    assert not capsys.readouterr().err


def test_reopening_drops_what_comes_after_the_step_and_the_summary(tmp_path):
    fill(tmp_path, 6)
    open_log(tmp_path, from_step=4).close()
    assert lines(tmp_path) == [("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4)]
    fill(tmp_path, 2)  # from step 0: nothing of the old run stays
    assert lines(tmp_path) == [("train", 1), ("train", 2), ("eval", 2), ("summary", 2)]


def test_reopening_drops_a_line_that_was_cut_off(tmp_path):
    fill(tmp_path, 2)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 2, "tok')
    log = open_log(tmp_path, from_step=2)
    log.write("train", 3, 384, **TRAIN)
    log.close()
    assert lines(tmp_path) == [("train", 1), ("train", 2), ("eval", 2), ("train", 3)]


def test_figures_of_the_whole_run_include_the_part_before_a_resume(tmp_path):
    fill(tmp_path, 4)
    log = open_log(tmp_path, from_step=4)
    log.write("train", 5, 640, **TRAIN | {"step_time_s": 0.75})
    assert log.step_times == [0.5] * 4 + [0.75]
    assert log.peak_memory_gib == 4.0
    log.close()


def tensorboard_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_mirrors_numbers_and_forgets_steps_that_are_done_again(tmp_path):
    fill(tmp_path, 4, tensorboard=True)
    log = open_log(tmp_path, from_step=2, tensorboard=True)
    log.write("train", 3, 384, ntp_loss=9.0, concept_loss=None)
    log.close()
    scalars = tensorboard_scalars(tmp_path)
    assert scalars["train/ntp_loss"] == [(1, 3.0), (2, 3.0), (3, 9.0)]
    assert scalars["eval/loss"] == [(2, 2.0)]
    assert "train/concept_loss" not in scalars


@pytest.mark.parametrize(
    ("module", "settings", "message"),
    [
        ("wandb", {"wandb_project": "p"}, r"cocomix\[wandb\]"),
        ("torch.utils.tensorboard", {"tensorboard": True}, r"cocomix\[train\]"),
    ],
)
def test_a_missing_logger_says_how_to_get_it(tmp_path, monkeypatch, module, settings, message):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CocomixError, match=message):
        open_log(tmp_path, **settings)


class Wandb:
    """A stand-in for the library, with its rules: a run that is resumed goes on behind its last step, and what is
    logged for an earlier step than that is dropped."""

    def __init__(self):
        self.runs: dict[str, WandbRun] = {}

    def init(self, project, name, dir, config, resume, id):
        assert resume == "allow" and (project, name) == ("p", dir.name)
        return self.runs.setdefault(id, WandbRun())


class WandbRun:
    def __init__(self):
        self.rows, self.last_step, self.axes, self.is_open = [], -1, {}, True

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, values, step=None):
        step = self.last_step + 1 if step is None else step
        if step >= self.last_step:
            self.rows.append(values)
            self.last_step = step

    def finish(self):
        self.is_open = False

    def points(self, name):
        """What a chart of a figure shows: its values over its axis."""
        axis = self.axes.get("*")
        return [(row[axis] if axis else index, row[name]) for index, row in enumerate(self.rows) if name in row]


@pytest.fixture
def wandb(monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_wandb_gets_every_figure_over_steps_again_after_a_resume_and_events(tmp_path, wandb):
    fill(tmp_path, 4, wandb_project="p")
    log = open_log(tmp_path, from_step=2, wandb_project="p")
    log.write("train", 3, 384, ntp_loss=9.0, concept_loss=None)
    log.event("spike", 4, 512, loss=12.0, windows=[1, 2])
    log.event("skipped", 5, 640, loss=None, windows=[3])
    log.close()
    [run] = wandb.runs.values()
    assert run.points("train/ntp_loss") == [(1, 3.0), (2, 3.0), (3, 3.0), (4, 3.0), (3, 9.0)]
    assert run.points("tokens")[-3:] == [(3, 384), (4, 512), (5, 640)]
    assert run.points("event/spike") == [(4, 1)] and run.points("event/loss") == [(4, 12.0)]
    assert run.points("event/skipped") == [(5, 1)] and not run.points("train/concept_loss")
    assert not run.is_open


def test_runs_whose_folders_have_one_name_stay_apart_at_wandb(world, wandb, monkeypatch):
    options = ["train.wandb_project=p", "model.mixing=none"]
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert world.train("wandb/run", *options) == 75
    assert world.train("elsewhere/run", *options) == 0
    [first, second] = wandb.runs.values()
    assert len(second.points("train/loss")) == STEPS > len(first.points("train/loss"))
    shutil.rmtree(world.folder / "wandb/run/checkpoints/step-00000007")  # step 4 is the newest that is left
    assert world.train("wandb/run", *options, resume=True) == 0
    assert list(wandb.runs.values()) == [first, second]  # it goes on with its own
    assert [step for step, _ in first.points("train/loss")] == [*range(1, 8), *range(5, STEPS + 1)]
    shutil.rmtree(world.folder / "wandb/run")
    assert world.train("wandb/run", *options) == 0
    assert len(wandb.runs) == 3  # it starts over


def test_a_branch_is_a_run_of_its_own_at_wandb(world, wandb):
    options = ["train.wandb_project=p", "model.mixing=none", "train.keep_checkpoints=9"]
    assert world.train("trunk", *options, "train.schedule=constant") == 0
    assert world.train("branch", *options, "train.schedule=wsd", branch_from="trunk") == 0
    trunk, branch = wandb.runs.values()
    steps = [[step for step, _ in run.points("train/loss")] for run in (trunk, branch)]
    assert steps == [list(range(1, STEPS + 1)), list(range(9, STEPS + 1))]


def test_a_run_of_an_earlier_version_is_resumed_under_the_name_that_it_had(world, wandb, monkeypatch):
    options = ["train.wandb_project=p", "model.mixing=none"]
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        assert world.train("earlier", *options) == 75
    file = world.folder / "earlier/run.json"
    change_json(file, {}, without=("id",))
    assert world.train("earlier", *options, resume=True) == 0
    assert list(wandb.runs)[1:] == ["earlier"]


def test_peak_memory_grows_with_what_is_held():
    before = peak_memory_gib(torch.device("cpu"))
    block = np.ones(1 << 26)  # half a GiB, touched
    after = peak_memory_gib(torch.device("cpu"))
    assert 0 < before < 1000 and after >= max(before, block.nbytes / 2**30)


def test_progress_in_a_log_file_has_a_line_an_update(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("run", 3, 1, True) as bar:
        bar.mininterval = 0
        bar.update()
        bar.set_postfix_str("loss 2.000", refresh=False)
        bar.update()
    text = sys.stderr.getvalue()
    assert "\r" not in text and text.endswith("\n") and "\n\n" not in text
    assert "1/3" in text.splitlines()[0]
    assert "3/3" in text.splitlines()[-1] and "loss 2.000" in text.splitlines()[-1]


def test_other_ranks_show_no_progress(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar("run", 3, 0, False) as bar:
        bar.update(3)
    assert sys.stderr.getvalue() == ""


class FullDisk:
    """A file that takes `left` bytes more."""

    def __init__(self, file, left):
        self._file, self.left = file, left

    def write(self, content):
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = self._file.write(content[: self.left])
        self.left -= taken
        return taken

    def close(self):
        self._file.close()


@pytest.mark.parametrize("left", [0, 1, 150, 300])
def test_a_full_disk_ends_a_run_unless_it_is_to_go_on_and_then_loses_no_line(tmp_path, left, capsys):
    ending = open_log(tmp_path / "ends")
    ending._file = FullDisk(ending._file, left)
    with pytest.raises(CocomixError, match="no room on disk"):
        for step in range(1, 4):
            ending.write("train", step, step * 128, **TRAIN)
    log = open_log(tmp_path / "goes-on", continue_after_failed_save=True)
    log._file = disk = FullDisk(log._file, left)
    for step in range(1, 4):
        log.write("train", step, step * 128, **TRAIN)
    assert capsys.readouterr().err.count("training continues") == 1
    disk.left = 10_000
    log.event("spike", 4, 512, loss=9.0)
    log.close()
    assert lines(tmp_path / "goes-on") == [("train", 1), ("train", 2), ("train", 3), ("event", 4)]
