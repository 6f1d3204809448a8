import errno
import io
import json
import sys

import numpy as np
import pytest
import torch

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
    assert log.step_times() == [0.5] * 4 + [0.75]
    assert log.peak_memory_gib() == 4.0
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


class FullDisk(io.StringIO):
    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        self.flush()


def test_a_full_disk_is_named_and_does_not_spoil_closing(tmp_path):
    log = open_log(tmp_path)
    log._file.close()
    log._file = FullDisk()
    with pytest.raises(CocomixError, match=r"no room on disk while writing .*metrics\.jsonl"):
        log.write("train", 1, 128, **TRAIN)
    log.close()


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
