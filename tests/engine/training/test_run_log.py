import math
from types import SimpleNamespace

import pytest
import torch
from record_helpers import RECORD

from cocomix.core.config import Config, TrainConfig
from cocomix.distributed.ranks import Ranks
from cocomix.training.divergence_watch import Event
from cocomix.training.interval import IntervalFigures
from cocomix.training.metrics import readable_lines
from cocomix.training.run_log import RunLog
from cocomix.training.run_record import RunRecord
from cocomix.training.validation import Evaluation

STEP = SimpleNamespace(lr=1e-3, grad_norm=torch.tensor(2.0), engine=SimpleNamespace(skipped_steps=1))


@pytest.fixture
def open_log(tmp_path):
    """A function that opens the log of a run."""
    logs = []

    def make(rank=0, from_step=0, elapsed_s=0.0):
        config = Config(train=TrainConfig(run=str(tmp_path), tensorboard=False))
        logs.append(RunLog(RECORD, config, Ranks(rank, 2, torch.device("cpu")), from_step, elapsed_s))
        return logs[-1]

    yield make
    for log in logs:
        log.bar.close()
        log.close()


def figures(*losses, skipped=False, seconds=2.0):
    return IntervalFigures([{"loss": loss, "ntp_loss": loss} for loss in losses], [skipped] * len(losses), seconds)


def lines(folder):
    return list(readable_lines(folder / "metrics.jsonl"))


def test_a_training_line_holds_means_and_speed(tmp_path, open_log):
    log = open_log(elapsed_s=5.0)
    log.training(4, figures(2.0, 4.0), STEP)
    [line] = lines(tmp_path)
    assert line.pop("peak_memory_gib") > 0
    assert line == {
        "kind": "train",
        "step": 4,
        "tokens": 512,
        "loss": 3.0,
        "ntp_loss": 3.0,
        "concept_loss": None,
        "lr": 1e-3,
        "grad_norm": 2.0,
        "skipped_steps": 1,
        "step_time_s": 1.0,
        "tokens_per_s": 128.0,
        "elapsed_s": 7.0,
    }
    assert RunRecord.read(tmp_path) == RECORD


def test_time_of_steps_that_were_all_skipped_counts_without_a_line(tmp_path, open_log):
    log = open_log()
    log.training(2, figures(math.nan, math.nan, skipped=True), STEP)
    assert lines(tmp_path) == [] and log.elapsed_s == 2.0


def test_events_are_written_and_said(tmp_path, open_log, capsys):
    log = open_log()
    log.events([Event("skipped", 3, math.inf, [1, 2], "windows 1, 2"), Event("spike", 4, 9.0, [3, 4], "windows 3, 4")])
    assert [(line["event"], line["step"], line["loss"], line["windows"]) for line in lines(tmp_path)] == [
        ("skipped", 3, None, [1, 2]),
        ("spike", 4, 9.0, [3, 4]),
    ]
    said = capsys.readouterr().err
    assert "step 3: skipped: the loss or its gradient is not finite (loss inf); it read windows 1, 2\n" in said
    assert "step 4: loss spike (loss 9); it read windows 3, 4\n" in said


def test_an_evaluation_is_written_once_a_step_and_the_summary_holds_typical_speed(tmp_path, open_log):
    log = open_log()
    for step, seconds in enumerate([10.0, 1.0, 2.0, 3.0], start=1):
        log.training(step, figures(2.0, seconds=seconds), STEP)
    found = Evaluation(1.5, {"concept_tokens": 8})
    log.evaluation(4, found)
    log.evaluation(4, found)
    log.summary(4, found)
    first, summary = lines(tmp_path)[-2:]
    assert first == {
        "kind": "eval",
        "step": 4,
        "tokens": 512,
        "loss": 1.5,
        "perplexity": math.exp(1.5),
        "elapsed_s": 16.0,
        "concept_tokens": 8,
    }
    assert (summary["kind"], summary["loss"], summary["step_time_s"], summary["tokens_per_s"]) == (
        "summary",
        1.5,
        2,
        64,
    )
    assert (summary["step_time_p10_s"], summary["step_time_p90_s"]) == (1.0, 3.0)


def test_other_ranks_write_nothing_but_know_the_time(tmp_path, open_log, capsys):
    log = open_log(rank=1)
    log.training(4, figures(2.0, 4.0), STEP)
    log.events([Event("spike", 4, 9.0, [3], "windows 3")])
    log.evaluation(4, Evaluation(1.5))
    log.summary(4, Evaluation(1.5))
    assert list(tmp_path.iterdir()) == [] and log.elapsed_s == 2.0 and capsys.readouterr().err == ""


def test_lines_that_are_gone_are_said_by_their_number(tmp_path, open_log, capsys):
    log = open_log()
    for step in (2, 4):
        log.training(step, figures(2.0, 4.0), STEP)
    log.require_lines(2)
    assert "lacks" not in capsys.readouterr().err
    log.require_lines(5)
    assert "metrics.jsonl lacks 3 of the 5 lines of before" in capsys.readouterr().err


def test_without_training_lines_there_is_no_summary_and_no_error(tmp_path, open_log, capsys):
    log = open_log()
    log.summary(4, Evaluation(1.5))
    assert lines(tmp_path) == [] and "has lost its training lines" in capsys.readouterr().err
