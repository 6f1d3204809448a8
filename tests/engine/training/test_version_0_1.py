"""What version 0.1.0 left on disk is taken up: a run that was interrupted after step 4 of 8, its data, its caches."""

import shutil
from pathlib import Path

import pytest

from cocomix.cli import main
from cocomix.training.metrics import readable_lines

LEFT = Path(__file__).parents[2] / "fixtures" / "version_0_1"
CUT, STEPS = 4, 8


@pytest.fixture
def left(tmp_path, monkeypatch):
    """A copy of what was left; the paths in its config are relative to it."""
    folder = tmp_path / "version_0_1"
    shutil.copytree(LEFT, folder)
    monkeypatch.chdir(folder)
    return folder


def lines(run):
    """The lines of metrics.jsonl by kind and step."""
    records = readable_lines(run / "metrics.jsonl")
    return {(record["kind"], record["step"]): record for record in records}


def contents(*folders):
    """Every file below `folders`, with its bytes."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_its_run_resumes_with_the_same_losses(left, capsys):
    before = lines(LEFT / "run")
    assert main(["train", "config.yaml", "--resume"]) == 0
    out = capsys.readouterr().out
    assert f"validation perplexity {before['summary', STEPS]['perplexity']:.2f} after {STEPS} steps" in out
    assert "with changes" not in out
    after = lines(left / "run")
    assert after.keys() == before.keys()
    for (kind, step), record in after.items():
        old = before[kind, step]
        if step <= CUT:
            assert record == old
            continue
        assert list(record) == list(old)
        numbers = {name: value for name, value in old.items() if "loss" in name or name in ("lr", "perplexity")}
        assert {name: record[name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    assert main(["eval", "run"]) == 0
    assert main(["report", "run"]) == 0
    assert "CoCoMix with distillation (cached" in capsys.readouterr().out


def test_its_model_is_evaluated_and_its_run_reported(left, capsys):
    assert main(["eval", "run"]) == 0
    assert f"{lines(LEFT / 'run')['summary', STEPS]['perplexity']:.2f}" in capsys.readouterr().out
    assert main(["report", "run"]) == 0
    assert "CoCoMix with distillation (cached" in capsys.readouterr().out


def test_its_caches_are_complete_and_stay_as_they_are(left, capsys):
    caches = left / "labels", left / "soft-targets"
    before = contents(*caches)
    assert main(["labels", "config.yaml"]) == 0
    said = capsys.readouterr().out
    assert "labels is complete: 161 windows" in said and "soft-targets is complete: 161 windows" in said
    assert contents(*caches) == before


def test_its_sae_is_found(left, capsys):
    before = contents(left / "sae")
    assert main(["sae", "config.yaml"]) == 0
    assert "sae already holds this SAE" in capsys.readouterr().out
    assert contents(left / "sae") == before
