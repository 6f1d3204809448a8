"""`cocomix report --json`."""

import json

import pytest
from run_files import write_run

from cocomix.cli import main
from cocomix.report.runs import load_run
from cocomix.report.token_saving import saving


def test_the_file_holds_curves_points_and_savings_of_each_method(tmp_path, capsys):
    ntp = write_run(tmp_path / "ntp")
    mixed = write_run(tmp_path / "mixed", "interleave", offset=-0.08, step_time=0.82)
    out = tmp_path / "new" / "comparison.json"
    assert main(["report", str(ntp), str(mixed), "--out", str(tmp_path / "out"), "--json", str(out)]) == 0
    assert f"figures: {out}" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["kind"] == "comparison" and found["unigram_perplexity"] == 612.3
    base, arm = found["arms"]
    assert (base["title"], base["saving"], arm["title"]) == ("NTP", None, "CoCoMix (cached labels)")
    evaluations = load_run(mixed).evaluations
    assert arm["curves"] == {"None": [[e["tokens"], e["loss"]] for e in evaluations]}
    assert arm["points"][-1] == dict(
        tokens=evaluations[-1]["tokens"],
        flops=evaluations[-1]["tokens"] * 300e6,
        **dict.fromkeys(("loss", "low", "high"), evaluations[-1]["loss"]),
    )
    expected = saving(evaluations, load_run(ntp).evaluations)
    assert arm["saving"]["share"] == expected.share
    assert arm["saving"]["arithmetic"] == pytest.approx(1 - (1 - expected.share) * 2)
    assert arm["saving"]["time"] == pytest.approx(1 - (1 - expected.share) * 0.82 / 0.5)
    assert arm["runs"] == [str(mixed)] and arm["step_time_ratio"] == pytest.approx(1.64)


def test_without_runs_there_is_nothing_to_compare(tmp_path, capsys):
    assert main(["report", "--bench", str(tmp_path / "b.json"), "--json", str(tmp_path / "c.json")]) == 2
    assert "--json writes the comparison of runs: name their folders" in capsys.readouterr().err
