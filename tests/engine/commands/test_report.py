import os
import subprocess
import sys

import pytest
from command_helpers import one_line
from run_files import write_run

from cocomix.cli import main


def test_nothing_to_report_is_one_line(capsys, tmp_path):
    assert main(["report", "--out", str(tmp_path / "report")]) == 2
    assert "nothing to report: name the folder of a run, or a file with --profile or --bench" in one_line(
        capsys, "report"
    )
    assert not (tmp_path / "report").exists()


def test_a_folder_that_holds_no_run_is_one_line(capsys, tmp_path):
    assert main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "report")]) == 2
    assert str(tmp_path / "none") in one_line(capsys, "report")
    assert not (tmp_path / "report").exists()


def test_the_table_of_runs_stands_above_what_was_measured(monkeypatch, capsys):
    monkeypatch.setattr("cocomix.report.report.load_run", lambda folder: f"run {folder}")
    monkeypatch.setattr("cocomix.report.report.comparison_table", lambda runs: f"table of {runs}")
    monkeypatch.setattr("cocomix.report.report.write_report", lambda runs, out, sections: f"{out}: {runs}, {sections}")
    monkeypatch.setattr("cocomix.report.measurement_page.measured_sections", lambda *files: (["section"], f"{files}"))
    measured = ["--profile", "p", "--profile", "q", "--bench", "b", "--bench-before", "a"]
    assert main(["report", "one", "two", *measured, "--out", "folder"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "table of ['run one', 'run two']",
        "(['p', 'q'], 'b', 'a')",
        "report: folder: ['run one', 'run two'], ['section']",
    ]


@pytest.mark.parametrize("where", ["an ASCII file", "a reader that leaves at once"])
def test_the_page_is_written_wherever_the_table_is_printed_to(tmp_path, where):
    write_run(tmp_path / "run")
    command = [sys.executable, "-m", "cocomix", "report", str(tmp_path / "run"), "--out", str(tmp_path / "é–")]
    command += ["--json", str(tmp_path / "figures.json")]
    reading, writing = os.pipe()
    os.close(reading)
    stdout = open(tmp_path / "out", "w") if where == "an ASCII file" else os.fdopen(writing, "w")
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": "1"}
    with stdout:
        done = subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == (0 if where == "an ASCII file" else 141) and "Traceback" not in done.stderr, done.stderr
    assert (tmp_path / "é–/report.html").exists() and (tmp_path / "figures.json").exists()
    if where == "an ASCII file":
        assert r"/\xe9\u2013/report.html" in (tmp_path / "out").read_text()
