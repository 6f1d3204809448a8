"""Profiles and benchmarks in the report: what is read, drawn, compared and refused."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from profile_helpers import profile_results

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.costs.profile_results import ProfileResults
from cocomix.report import measurement_figures
from cocomix.report.measurement_page import benchmark_sections, measured_sections, profile_sections
from cocomix.report.measurements import compare, load_benchmarks

RESULTS = Path(__file__).parents[3] / "benchmarks/results"


def spread(median, width=0.1):
    return {"median": median, "p10": median * (1 - width), "p90": median * (1 + width)}


def row(contestant, ms, floor_ms=2.0, n=512, d=64, width=0.1):
    return {
        "operation": "topk_linear",
        "case": f"encode-n{n}-d{d}",
        "contestant": contestant,
        "shape": {"N": n, "d": d, "dtype": "torch.float32"},
        "ms": spread(ms, width),
        "floor_formula": "one product",
        "ratio_to_floor": spread(ms / floor_ms, width) if floor_ms else None,
    }


def bench_file(path, rows, device="a chip"):
    path.write_text(
        json.dumps(
            {
                "machine_info": {"cocomix": {"device": device, "threads": 2}},
                "benchmarks": [{"extra_info": row} for row in rows],
            }
        )
    )
    return path


def profile_file(path):
    path.write_text(json.dumps(profile_results().as_json()))
    return path


# ---- comparing


@pytest.mark.parametrize(
    ("before", "now", "verdict"),
    [
        (4.0, 4.0, "same"),
        (4.0, 4.5, "same"),
        (4.0, 6.0, "slower"),
        (4.0, 3.0, "faster"),
    ],
)
def test_what_differs_beyond_the_spreads_of_both_is_flagged(tmp_path, before, now, verdict):
    old = load_benchmarks(bench_file(tmp_path / "old.json", [row("torch", before), row("floor", 2.0)]))
    new = load_benchmarks(bench_file(tmp_path / "new.json", [row("torch", now), row("floor", 2.0)]))
    [change] = compare(old, new)
    assert (change.verdict, change.contestant, change.unit) == (verdict, "torch", "x floor")
    assert change.ratio == pytest.approx(now / before)


def test_a_machine_that_is_slower_as_a_whole_is_no_regression(tmp_path):
    old = load_benchmarks(bench_file(tmp_path / "old.json", [row("torch", 4.0, floor_ms=2.0)]))
    new = load_benchmarks(bench_file(tmp_path / "new.json", [row("torch", 8.0, floor_ms=4.0)]))
    assert compare(old, new)[0].verdict == "same"
    old, new = (load_benchmarks(bench_file(tmp_path / "x.json", [row("torch", ms, floor_ms=None)])) for ms in (4, 8))
    assert (compare(old, new)[0].verdict, compare(old, new)[0].unit) == ("slower", "ms")


def test_only_equal_shapes_of_one_device_are_compared(tmp_path):
    old = load_benchmarks(bench_file(tmp_path / "old.json", [row("torch", 4.0, n=512)]))
    with pytest.raises(CocomixError, match="have no benchmark in common"):
        compare(old, load_benchmarks(bench_file(tmp_path / "new.json", [row("torch", 4.0, n=1024)])))
    with pytest.raises(CocomixError, match="measured on a chip and .* on another: compare files of one device"):
        compare(old, load_benchmarks(bench_file(tmp_path / "new.json", [row("torch", 4.0)], "another")))


# ---- drawing


def test_parts_are_stacked_to_the_whole_step(tmp_path):
    axes = measurement_figures.step_parts(ProfileResults.read(profile_file(tmp_path / "p.json"))).axes[0]
    ends = {}
    for bar in axes.patches:
        y = round(bar.get_y() + bar.get_height() / 2)
        assert bar.get_x() == pytest.approx(ends.get(y, 0))
        ends[y] = bar.get_x() + bar.get_width()
    assert ends == {0: pytest.approx(100), 1: pytest.approx(100)}
    assert [text.get_text() for text in axes.texts if "ms" in text.get_text()] == ["100 ms", "100 ms"]
    widths = [bar.get_width() for bar in axes.patches if bar.get_width()]
    assert sorted(set(np.round(widths))) == [20, 40]


def test_a_profile_without_parts_has_a_table_alone(tmp_path):
    profile = ProfileResults.read(profile_file(tmp_path / "p.json"))
    without = {name: dataclasses.replace(method, parts=None) for name, method in profile.methods.items()}
    profile = dataclasses.replace(profile, methods=without)
    [section] = profile_sections(profile, 1, "p.json")
    assert "What a step costs" in section.html and not section.figures


def test_operations_are_drawn_against_their_floor(tmp_path):
    rows = [row("torch", 4.0), row("public", 6.0), row("floor", 2.0)]
    axes = measurement_figures.against_floor(rows).axes[0]
    assert [text.get_text() for text in axes.texts] == ["2.00", "3.00"]
    assert measurement_figures.against_floor([row("torch", 4.0, floor_ms=None)]) is None


def test_sweeps_are_rows_that_differ_in_one_dimension_alone():
    rows = [row("torch", ms, n=n) for n, ms in ((1024, 8), (512, 4), (2048, 16))]
    rows += [row("torch", 3, d=128), row("public", 9), row("public", 9, n=1024)]
    found = measurement_figures.sweeps(rows)
    assert set(found) == {"N"}
    [group] = found["N"]
    assert [(one["shape"]["N"], one["contestant"]) for one in group] == [
        (512, "torch"),
        (1024, "torch"),
        (2048, "torch"),
    ]
    line = measurement_figures.sweep("N", found["N"]).axes[0].lines[0]
    assert list(line.get_xdata()) == [512, 1024, 2048] and list(line.get_ydata()) == [4, 8, 16]


def test_a_sweep_has_a_panel_for_each_operation_and_one_style_for_each_contestant():
    rows = [
        row(name, n / 128, n=n) | {"operation": operation}
        for operation, names in (("concept_head", ("public", "torch")), ("topk_linear", ("torch",)))
        for name in names
        for n in (256, 512, 1024)
    ]
    groups = measurement_figures.sweeps(rows)["N"]
    figure = measurement_figures.sweep("N", groups)
    first, second = (axes for axes in figure.axes if axes.get_visible())
    assert first.get_title(loc="left") == "concept_head: encode\nd 64"
    assert second.get_title(loc="left") == "topk_linear: encode\nd 64"
    assert [line.get_label() for line in first.lines] == ["public", "torch"]
    styles = {(line.get_label(), line.get_color(), line.get_marker()) for axes in figure.axes for line in axes.lines}
    assert len(styles) == 2
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["public", "torch"]
    figure.canvas.draw()
    assert [tick.get_text() for tick in first.get_xticklabels()] == ["256", "512", "1,024"]
    assert not any(tick.get_text() for tick in first.get_xticklabels(minor=True))


# ---- the page


def test_one_command_makes_a_page_of_all_measurements(tmp_path, capsys):
    old = bench_file(tmp_path / "old.json", [row("torch", 4.0), row("floor", 2.0)])
    new = bench_file(tmp_path / "new.json", [row("torch", 8.0), row("floor", 2.0)])
    profile = profile_file(tmp_path / "p.json")
    assert (
        main(
            [
                "report",
                "--profile",
                str(profile),
                "--bench",
                str(new),
                "--bench-before",
                str(old),
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "slower: topk_linear encode-n512-d64 torch: 2 -> 4 x floor (x 2.00)" in out
    assert "1 benchmarks compared: 1 slower, 0 faster beyond the noise" in out
    page = (tmp_path / "out/report.html").read_text()
    for text in (
        "What a step costs: p.json",
        "CoCoMix, cached labels",
        "1.60",
        "37.5%",
        "21.5%",
        "Floor: one product",
        "Compared with the older run",
        "a chip",
    ):
        assert text in page, text
    assert page.count("<svg") == 2
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"step_parts_1.png", "bench_topk_linear.png"}


def test_several_profiles_keep_their_figures_apart(tmp_path):
    path = str(profile_file(tmp_path / "p.json"))
    names = [name for section in measured_sections([path, path], None, None)[0] for name, _ in section.figures]
    assert names == ["step_parts_1", "step_parts_2"]


def test_sections_of_benchmarks_hold_sweeps(tmp_path):
    rows = [row("torch", n / 128, n=n) for n in (512, 1024, 2048)]
    names = [
        name
        for section in benchmark_sections(load_benchmarks(bench_file(tmp_path / "b.json", rows)))
        for name, _ in section.figures
    ]
    assert names == ["bench_topk_linear", "sweep_N"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to report: name the folder of a run, or a file with --profile or --bench"),
        (["--profile", "PROFILE", "--bench-before", "BENCH"], "name the newer file too"),
        (["--profile", "BENCH"], "is not a profile"),
        (["--bench", "PROFILE"], "does not hold benchmarks"),
        (["--bench", "OTHER"], "holds no figures of cocomix's benchmarks: it lists 1 others"),
        (["--bench", "MISSING"], "the benchmark file is missing"),
    ],
)
def test_other_files_are_refused(tmp_path, capsys, arguments, message):
    files = {
        "BENCH": bench_file(tmp_path / "b.json", [row("torch", 1.0)]),
        "MISSING": tmp_path / "none.json",
        "PROFILE": profile_file(tmp_path / "p.json"),
        "OTHER": bench_file(tmp_path / "o.json", [{"name": "something"}]),
    }
    before = set(tmp_path.iterdir())
    assert main(["report", "--out", str(tmp_path / "out"), *(str(files.get(a, a)) for a in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("file", sorted(RESULTS.glob("profile-*.json")), ids=lambda file: file.stem)
def test_the_kept_profiles_are_read(file):
    """Those of four threads are of version 0.1."""
    assert ("modes" in json.loads(file.read_text())) == file.stem.startswith("profile-cpu-4-threads")
    methods = ProfileResults.read(file).methods
    assert "ntp" in methods and all(method.title and method.step_s.median > 0 for method in methods.values())
    assert measured_sections([str(file)], None, None)[0]
