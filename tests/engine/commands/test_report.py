from command_helpers import one_line

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
