"""`cocomix report`: reading run folders, the comparison at equal tokens, and the page."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from run_files import TOKENS_PER_STEP, metrics, write_run

from cocomix.core.errors import CocomixError
from cocomix.report import figures, report
from cocomix.report import runs as runs_module
from cocomix.report.arms import arms
from cocomix.report.report import comparison_table, load_run, write_report


@pytest.fixture
def pair(tmp_path):
    ntp = load_run(write_run(tmp_path / "ntp"))
    mixed = load_run(write_run(tmp_path / "mixed", "interleave", offset=-0.08, step_time=0.82))
    return [ntp, mixed]


def cells(table, title):
    """The cells of a row of the plain-text table after its title."""
    line = next(line for line in table.splitlines() if line.startswith(title + " "))
    return line.removeprefix(title).split()


class Page(HTMLParser):
    """What the browser would see: text, tag counts and attributes."""

    def __init__(self, path):
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        self.text += data


# ---- reading


def test_a_finished_run_is_read_with_its_lines_by_kind(tmp_path):
    run = load_run(write_run(tmp_path / "run", "interleave"))
    assert [record["step"] for record in run.evaluations] == [50, 100, 150, 200]
    assert len(run.train) == 20
    assert run.summary["step"] == run.last_step == 200
    assert run.title == "CoCoMix (cached labels)"


def test_other_methods_have_titles_and_a_saving_of_their_own(tmp_path):
    ntp = load_run(write_run(tmp_path / "ntp"))
    distilled = load_run(
        write_run(
            tmp_path / "distilled",
            offset=-0.05,
            distilled=True,
            config={"distillation": {"top_k": 8}, "train": {"eval_windows": 0}},
        )
    )
    lagging = load_run(write_run(tmp_path / "lagging", "pause", concept_labels=None, offset=2.0))
    by_activation = load_run(write_run(tmp_path / "by", "interleave", config={"teacher": {"labels_by": "activation"}}))
    both = load_run(write_run(tmp_path / "both", "predict", distilled=True))
    assert distilled.title == "NTP with distillation (cached top-8 soft targets)"
    assert by_activation.title == "CoCoMix (cached labels by activation)"
    assert both.title == "concept prediction with distillation (cached labels, cached whole soft targets)"
    assert load_run(write_run(tmp_path / "pause", "pause", concept_labels=None)).title == "pause tokens"
    assert [run.is_baseline for run in (ntp, distilled, by_activation, both)] == [True, False, False, False]
    text = comparison_table([distilled, ntp, lagging])
    assert "NTP with distillation (cached top-8 soft targets) reaches a validation loss of" in text
    assert cells(text, "NTP with distillation (cached top-8 soft targets)")[2] == "1.00"
    assert "pause tokens comes to a validation loss of 6.455, which NTP was past at its first evaluation." in text
    assert text.count("What other seeds would give is not in these bounds.") == 1
    assert "seeds" not in comparison_table([ntp]) + comparison_table([ntp, lagging])
    once = [
        load_run(write_run(tmp_path / f"once-{mode}", mode, steps=50, offset=offset))
        for mode, offset in (("none", 0.0), ("interleave", 1.0))
    ]
    assert "first evaluation" not in comparison_table(once)


@pytest.mark.parametrize(
    "mode, labels, title",
    [
        ("none", None, "NTP"),
        ("none", "cached", "NTP"),
        ("add", "online", "CoCoMix add (online labels)"),
        ("interleave", None, "CoCoMix"),
    ],
)
def test_titles_name_method_and_labels(tmp_path, mode, labels, title):
    assert load_run(write_run(tmp_path / "run", mode, concept_labels=labels)).title == title


def test_an_unfinished_run_reports_medians_without_the_first_line(tmp_path):
    run = load_run(write_run(tmp_path / "run", steps=120, finished=False, total_steps=200))
    assert run.summary is None
    assert run.step_time_s == 0.5 and run.tokens_per_s == TOKENS_PER_STEP / 0.5
    assert run.peak_memory_gib == 1.25
    assert "NTP has not finished: step 120 of 200." in comparison_table([run])


def test_the_summary_counts_as_evaluation_where_the_last_step_has_none(tmp_path):
    run = load_run(write_run(tmp_path / "run", steps=120))
    assert [record["step"] for record in run.evaluations] == [50, 100, 120]


def test_a_last_line_that_is_cut_off_is_left_out(tmp_path):
    folder = write_run(tmp_path / "run", finished=False)
    whole = load_run(folder)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write('{"kind": "eval", "step": 250, "note": "é'.encode()[:-1])
    assert load_run(folder) == whole


@pytest.mark.parametrize(
    "line",
    [
        '{"kind": "train", "st',
        "[1, 2]",
        '{"step": 30}',
        '{"kind": "eval", "step": 30, "tokens": 1, "perplexity": 2.0, "elapsed_s": 1.0}',
        '{"kind": "eval", "step": 30, "tokens": 1, "loss": "x", "perplexity": 2.0, "elapsed_s": 1.0}',
        "\udcff",
    ],
)
def test_a_damaged_line_is_left_out_and_said(tmp_path, line, capsys):
    folder = write_run(tmp_path / "run")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    without = load_run(folder)
    assert not capsys.readouterr().err
    damaged = "\n".join([*lines[:2], line, *lines[3:]]) + "\n"
    (folder / "metrics.jsonl").write_text(damaged, errors="surrogateescape")
    assert load_run(folder) == without
    assert "metrics.jsonl: left out 1 damaged line, the first is line 3" in capsys.readouterr().err


def test_lines_of_an_unknown_kind_are_no_error(tmp_path):
    folder = write_run(tmp_path / "run")
    before = load_run(folder)
    content = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text('{"kind": "note", "text": "hello"}\n' + content)
    assert load_run(folder) == before


def test_steps_that_a_resumed_run_repeats_count_once_with_their_later_values(tmp_path):
    folder = write_run(tmp_path / "run", steps=130, finished=False)
    again = [
        line | {"perplexity": 77.0} if line["kind"] == "eval" else line
        for line in metrics("none", 200, 50, True, 0.0, 0.5)
        if line["step"] > 80
    ]
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in again)
    run = load_run(folder)
    assert [record["step"] for record in run.train] == list(range(10, 201, 10))
    assert [record["step"] for record in run.evaluations] == [50, 100, 150, 200]
    assert [record["perplexity"] == 77.0 for record in run.evaluations] == [False, True, True, True]


def test_a_run_that_was_prolonged_counts_as_unfinished_until_its_new_end(tmp_path):
    folder = write_run(tmp_path / "run", steps=100)
    with open(folder / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(line) + "\n" for line in metrics("none", 150, 50, False, 0.0, 0.5)[12:])
    run = load_run(folder)
    assert run.summary is None and run.last_step == 150
    assert [record["step"] for record in run.evaluations] == [50, 100, 150]


def test_folders_that_are_no_runs_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "absent", tmp_path / "empty"):
        with pytest.raises(CocomixError, match="not a run folder"):
            load_run(folder)


def test_a_run_without_evaluation_is_refused(tmp_path):
    early = write_run(tmp_path / "early", steps=40, finished=False)
    with pytest.raises(CocomixError, match="no evaluation yet"):
        load_run(early)
    (early / "metrics.jsonl").unlink()
    with pytest.raises(CocomixError, match="no evaluation yet"):
        load_run(early)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"method": "blend"}, "method is 'blend'"),
        ({"method": []}, "Expected `str`, got `array` - at `$.method`"),
        ({"parameters": "many"}, "Expected `int`, got `str` - at `$.parameters`"),
        ({"tokens_per_step": 0}, "Expected `int` >= 1 - at `$.tokens_per_step`"),
        ({"config": None}, "Expected `object`, got `null` - at `$.config`"),
        ({"data": {"vocab_size": 1}}, "missing required field `train_tokens` - at `$.data`"),
    ],
)
def test_a_description_with_wrong_values_is_refused(tmp_path, change, reason):
    with pytest.raises(CocomixError, match=re.escape(reason)):
        load_run(write_run(tmp_path / "run", **change))


def test_a_description_that_lacks_a_key_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    info = json.loads((folder / "run.json").read_text())
    del info["seq_len"]
    (folder / "run.json").write_text(json.dumps(info))
    with pytest.raises(CocomixError, match="missing required field `seq_len`"):
        load_run(folder)


# ---- the table


def test_the_table_holds_perplexity_speed_ratio_memory_and_size(pair):
    table = comparison_table(pair)
    expected = np.exp(4.0 + 5 / 11)
    assert table.splitlines()[0] == f"Validation perplexity after {200 * TOKENS_PER_STEP:,} training tokens"
    assert cells(table, "NTP") == [f"{expected:.2f}", "8,192", "1.00", "1.25", "25.2M"]
    mixed = cells(table, "CoCoMix (cached labels)")
    assert mixed == [f"{expected * np.exp(-0.08):.2f}", "4,995", "1.64", "1.25", "25.2M"]
    assert "unigram perplexity of the validation text is 612.3" in table


def test_the_columns_of_the_table_are_aligned(pair):
    lines = comparison_table(pair).splitlines()[2:6]
    assert len({len(line) for line in lines}) == 1
    assert all(line.isprintable() for line in lines)


def test_runs_are_compared_at_the_largest_token_count_that_all_have_evaluated(tmp_path):
    runs = [
        load_run(write_run(tmp_path / "ntp", steps=200)),
        load_run(write_run(tmp_path / "mixed", "interleave", steps=130, finished=False)),
    ]
    table = comparison_table(runs)
    assert f"after {100 * TOKENS_PER_STEP:,} training tokens" in table
    assert cells(table, "NTP")[0] == f"{np.exp(4 + 5 / 6):.1f}"


def test_runs_without_an_evaluation_at_equal_tokens_are_refused(tmp_path):
    runs = [
        load_run(write_run(tmp_path / "a", eval_every=50, steps=50)),
        load_run(write_run(tmp_path / "b", "interleave", eval_every=30, steps=60)),
    ]
    with pytest.raises(CocomixError, match="no evaluation at equal tokens"):
        comparison_table(runs)


def test_without_an_ntp_run_there_is_no_step_time_ratio(tmp_path):
    table = comparison_table([load_run(write_run(tmp_path / "mixed", "interleave"))])
    assert cells(table, "CoCoMix (cached labels)")[2] == "–"


def test_step_times_on_other_devices_are_not_compared(tmp_path, pair):
    other = load_run(write_run(tmp_path / "cpu", "add", device="cpu"))
    assert cells(comparison_table([*pair, other]), "CoCoMix add (cached labels)")[2] == "–"


def test_step_time_ratio_is_per_token_where_batch_sizes_differ(tmp_path, pair):
    larger = load_run(write_run(tmp_path / "large", "add", step_time=1.0, tokens_per_step=2 * TOKENS_PER_STEP))
    assert cells(comparison_table([*pair, larger]), "CoCoMix add (cached labels)")[2] == "1.00"


def test_runs_of_one_mode_are_told_apart_by_name_and_then_by_folder(tmp_path):
    runs = [load_run(write_run(tmp_path / "a", name="wide")), load_run(write_run(tmp_path / "b", name="deep"))]
    table = comparison_table(runs)
    assert "NTP, wide " in table and "NTP, deep " in table
    runs = [load_run(write_run(tmp_path / "c", name="same")), load_run(write_run(tmp_path / "d", name="same"))]
    assert f"NTP, same, {tmp_path / 'c'} " in comparison_table(runs)


DATA = {"vocab_size": 4096, "train_tokens": 2_500_000, "val_tokens": 130_000, "val_unigram_perplexity": 612.3}


@pytest.mark.parametrize(
    "change, key",
    [
        ({"data": DATA | {"vocab_size": 8192}}, "vocab_size is 4096 in the first and 8192"),
        ({"data": DATA | {"val_tokens": 90}}, "val_tokens is 130000 in the first and 90"),
        ({"seq_len": 512}, "seq_len is 256 in the first and 512"),
        ({"config": {"train": {"eval_windows": 8}}}, "train.eval_windows is 0 in the first and 8"),
    ],
)
def test_runs_whose_perplexities_mean_different_things_are_refused(tmp_path, pair, change, key):
    other = load_run(write_run(tmp_path / "other", **change))
    for compare in (comparison_table, lambda runs: write_report(runs, tmp_path / "out")):
        with pytest.raises(CocomixError, match=key):
            compare([pair[0], other])
    assert not (tmp_path / "out").exists()


def test_runs_that_differ_in_training_tokens_only_are_compared(tmp_path, pair):
    other = load_run(write_run(tmp_path / "other", "add", data=DATA | {"train_tokens": 9_000_000}))
    assert "CoCoMix add" in comparison_table([*pair, other])


def test_no_run_and_a_run_named_twice_are_refused(pair):
    with pytest.raises(CocomixError, match="no runs"):
        comparison_table([])
    with pytest.raises(CocomixError, match="named twice"):
        comparison_table([pair[0], pair[0]])


@pytest.mark.parametrize(
    "values, shown",
    [
        ([93.456, 101.234], ["93.46", "101.23"]),
        ([1234.5, 2345.6], ["1,234", "2,346"]),
        ([3.14159], ["3.142"]),
        ([None, 45.678], ["–", "45.68"]),
        ([float("inf"), 45.678], ["inf", "45.68"]),
        ([0.0], ["0"]),
        ([0.04567], ["0.04567"]),
    ],
)
def test_numbers_of_a_column_share_their_decimals(values, shown):
    assert runs_module.significant(values, digits=4) == shown


@pytest.mark.parametrize(
    "count, shown",
    [
        (512, "512"),
        (9_500, "9.50k"),
        (25_230_000, "25.2M"),
        (1_380_000_000, "1.38B"),
    ],
)
def test_counts_are_abbreviated_to_three_digits(count, shown):
    assert report._abbreviated(count) == shown


def test_moving_average_follows_a_slope_from_its_start_and_shrinks_noise_to_the_end():
    line = np.linspace(5, 3, 101)
    np.testing.assert_allclose(figures._moving_average(line, 10)[:91], line[:91])
    noise = np.random.default_rng(0).standard_normal(1001)
    smooth = figures._moving_average(noise, 10)
    assert smooth.std() < 0.35 * noise.std()
    assert smooth[-1] == pytest.approx(noise[-11:].mean())
    assert figures._moving_average(noise[:1], 10) == noise[0]


# ---- the page


def test_the_page_needs_nothing_beside_it(tmp_path, pair):
    path = write_report(pair, tmp_path / "out")
    page = Page(path)
    assert path == tmp_path / "out" / "report.html"
    assert page.tags.count("svg") == len(figures.FIGURES) - 1 == 7  # nothing is distilled here
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    loads = [value for name, value in page.attributes if name in ("src", "href", "xlink:href", "data", "srcset")]
    assert all(value.startswith("#") for value in loads)
    assert "@import" not in path.read_text() and not re.search(r"url\((?!#)", path.read_text())


def test_what_a_killed_report_left_half_written_is_swept_and_nothing_else(tmp_path, pair):
    ended = 2**22 + 1  # more than any process's number
    left = [f".{name}.0123abcd.{ended}.part" for name in ("report.html", f"{figures.FIGURES[0].name}.png")]
    others = [f".thesis.html.0123abcd.{ended}.part", "thesis.html"]
    for name in (*left, *others):
        (tmp_path / name).write_text("half")
    write_report(pair, tmp_path)
    assert not any((tmp_path / name).exists() for name in left)
    assert all((tmp_path / name).exists() for name in others)


def test_ids_on_the_page_are_unique_and_every_reference_has_its_target(tmp_path, pair):
    page = Page(write_report(pair, tmp_path))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    references = [value[1:] for name, value in page.attributes if name == "xlink:href"]
    references += [target for _, value in page.attributes for target in re.findall(r"url\(#([^)]+)\)", value or "")]
    assert references and set(references) <= set(ids)


def test_every_figure_lies_beside_the_page_as_png(tmp_path, pair):
    write_report([*pair, load_run(write_run(tmp_path / "distilled", distilled=True))], tmp_path / "out")
    pngs = sorted(path.name for path in (tmp_path / "out").iterdir() if path.suffix == ".png")
    assert pngs == sorted(f"{entry.name}.png" for entry in figures.FIGURES)
    assert all((tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for name in pngs)
    assert len(list((tmp_path / "out").iterdir())) == len(pngs) + 1


def test_the_page_shows_the_numbers_of_the_table_versions_and_settings(tmp_path, pair):
    text = Page(write_report(pair, tmp_path)).text
    table = comparison_table(pair)
    for value in [
        *cells(table, "NTP"),
        *cells(table, "CoCoMix (cached labels)"),
        "0.18.2",
        "1 × NVIDIA H100 80GB HBM3",
        'data.text=["stdlib"]',
        "train.lr=0.0006",
        "0.804 – 0.877",
    ]:
        assert value in text
    assert "model.mixing" in text and "settingNTPCoCoMix (cached labels)" in text.replace("\n", "")


def test_a_setting_that_was_renamed_between_two_runs_does_not_differ(tmp_path):
    folders = [write_run(tmp_path / name, "none", steps=100, name=name) for name in ("old", "new")]
    for folder, section in zip(folders, ("labels", "concept_labels"), strict=True):
        record = json.loads((folder / "run.json").read_text())
        record["config"].pop("concept_labels", None)
        record["config"][section] = {"cache": "a/folder"}
        (folder / "run.json").write_text(json.dumps(record))
    page = Page(write_report(list(map(load_run, folders)), tmp_path / "report")).text
    assert page.count("concept_labels.cache=a/folder") == 2 and page.count("concept_labels.cache") == 2


def test_hostile_names_reach_the_page_as_text(tmp_path):
    name = '<script>alert("1")</script> & $title $x^2$ ${y} id="a"'
    runs = [
        load_run(
            write_run(tmp_path / folder, name=name + folder, device=name, versions={name: name}, config={name: name})
        )
        for folder in ("a", "b")
    ]
    page = Page(write_report(runs, tmp_path / "out"))
    assert "script" not in page.tags
    assert page.text.count(f"NTP, {name}a") >= 3


def test_concept_loss_is_drawn_only_where_a_run_has_one(tmp_path, pair):
    out = tmp_path / "out"
    assert "Concept loss" in Page(write_report(pair, out)).text
    assert "Concept loss" not in Page(write_report(pair[:1], out)).text
    assert not (out / "concept_loss_tokens.png").exists()


def test_curves_show_the_runs_values_in_the_units_of_their_axes(pair):
    axes = figures.validation_loss_over_tokens(arms(pair)).axes[0]
    assert axes.get_xlabel() == "thousand tokens"
    for line, run in zip(axes.lines, pair, strict=False):
        np.testing.assert_allclose(line.get_xdata(), [e["tokens"] / 1e3 for e in run.evaluations])
        np.testing.assert_allclose(line.get_ydata(), [e["loss"] for e in run.evaluations])
    time = figures.validation_loss_over_time(arms(pair)).axes[0]
    assert time.get_xlabel() == "minutes"
    np.testing.assert_allclose(time.lines[1].get_xdata(), [e["elapsed_s"] / 60 for e in pair[1].evaluations])


def test_curves_differ_without_colours(tmp_path):
    runs = [load_run(write_run(tmp_path / str(number), "interleave", name=str(number))) for number in range(7)]
    lines = [
        line for line in figures.validation_loss_over_tokens(arms(runs)).axes[0].lines if line.get_marker() != "None"
    ]
    assert len({(line.get_linestyle(), line.get_marker()) for line in lines}) == 7
    assert len({line.get_marker() for line in lines}) == 7


def test_a_diverged_run_is_reported_as_it_is(tmp_path, pair):
    folder = write_run(tmp_path / "diverged", "add")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] > 100:
            line |= {"loss": float("nan"), "perplexity": float("nan"), "ntp_loss": float("nan"), "concept_loss": None}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    runs = [*pair, load_run(folder)]
    assert cells(comparison_table(runs), "CoCoMix add (cached labels)")[0] == "nan"
    assert write_report(runs, tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")
def test_a_run_that_never_had_a_finite_loss_makes_a_page(tmp_path):
    folder = write_run(tmp_path / "run")
    broken = re.sub(r'("(?:ntp_)?loss|"perplexity)": [0-9.]+', r'\1": NaN', (folder / "metrics.jsonl").read_text())
    (folder / "metrics.jsonl").write_text(broken)
    assert Page(write_report([load_run(folder)], tmp_path / "out")).tags.count("svg") == 4


def test_a_single_run_with_one_evaluation_makes_a_page(tmp_path):
    run = load_run(write_run(tmp_path / "run", steps=5, finished=True))
    assert run.train == [] and run.step_time_s == 0.5
    assert "Training loss" not in Page(write_report([run], tmp_path / "out")).text


def test_the_same_runs_give_the_same_page(tmp_path, pair):
    first = write_report(pair, tmp_path / "one").read_bytes()
    assert write_report(pair, tmp_path / "two").read_bytes() == first


def test_a_failure_while_drawing_leaves_the_earlier_page(tmp_path, pair, monkeypatch):
    path = write_report(pair[:1], tmp_path / "out")
    before = path.read_bytes()
    monkeypatch.setattr(report, "draw_figures", lambda runs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(pair, tmp_path / "out")
    assert path.read_bytes() == before


def test_other_files_in_the_folder_stay(tmp_path, pair):
    (tmp_path / "notes.txt").write_text("mine")
    write_report(pair, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_output_folder_that_is_a_file_is_refused(tmp_path, pair):
    (tmp_path / "out").write_text("")
    with pytest.raises(CocomixError, match="cannot be written"):
        write_report(pair, tmp_path / "out")


# ---- what the concepts and the arithmetic add


def test_the_saving_in_tokens_is_said_with_its_bounds(pair):
    """Both losses fall as 5 / (1 + step / 20), the mixed one from 0.08 below: it reaches the other's last one first."""
    [note] = [line for line in comparison_table(pair).splitlines() if "reaches a validation loss" in line]
    assert note.startswith("CoCoMix (cached labels) reaches a validation loss of 4.455 with ")
    assert "fewer tokens than NTP (a saving between 0.0% and 25.0%" in note
    share = float(note.split(" with ")[1].split("%")[0])
    exact = 1 - (20 * (5 / (5 / 11 + 0.08) - 1)) / 200  # the step at which it really crosses
    assert share == pytest.approx(100 * exact, abs=2)


def test_what_pays_in_tokens_may_not_in_arithmetic_or_time(pair):
    """The mixed run needs twice the arithmetic and, by its `step_time`, so many times the time of the other."""
    [note] = [line for line in comparison_table(pair).splitlines() if "reaches a validation loss" in line]
    share = float(note.split(" with ")[1].split("%")[0])
    [found] = re.findall(r"That is ([\d.]+)% more arithmetic and ", note)
    assert float(found) == pytest.approx(2 * (100 - share) - 100, abs=0.2)
    assert note.endswith(
        "time at the speeds measured here; in arithmetic it pays from a saving of 50.0% of the tokens on. "
        "Worth it here: in tokens yes, in arithmetic no, in time no."
    )


def test_a_method_that_was_ahead_from_the_first_has_no_saving_and_that_is_said(tmp_path):
    ntp = load_run(write_run(tmp_path / "ntp"))
    ahead = load_run(write_run(tmp_path / "ahead", "interleave", offset=-3.0))
    table = comparison_table([ntp, ahead])
    assert "CoCoMix (cached labels) is past the best validation loss of NTP (4.455) at its first evaluation: " in table
    assert "reaches a validation loss" not in table


def test_what_the_teacher_gave_is_a_line_of_its_own(tmp_path):
    ntp = write_run(tmp_path / "ntp")
    alike = [write_run(tmp_path / name, "interleave", supervision_flops_per_token=9e7) for name in ("one", "two")]
    online = write_run(
        tmp_path / "online", "add", concept_labels="online", supervision_flops_per_token=12e7, flops_per_token=42e7
    )
    table = comparison_table([load_run(folder) for folder in (ntp, *alike, online)])
    assert (
        "What 2 methods learned from the teacher took it 0.0900 GFLOP a token, 0.60 times NTP's arithmetic: once, for "
        "a cache, and not in the figures above.\n" in table
    )
    assert (
        "What CoCoMix add (online labels) learned from the teacher took it 0.120 GFLOP a token, 0.80 times NTP's "
        "arithmetic: while training, in the figures above." in table
    )
    assert "What" not in comparison_table([load_run(ntp)])
    both = write_run(tmp_path / "both", "add", soft_targets="online", supervision_flops_per_token=9e7)
    assert "a part of it once, for a cache, and not in the figures above, the rest while training." in (
        comparison_table([load_run(both)])
    )


def test_a_run_that_does_not_tell_its_arithmetic_is_judged_by_time_alone(tmp_path):
    folders = [write_run(tmp_path / "ntp"), write_run(tmp_path / "other", "interleave", offset=-0.3, step_time=0.25)]
    for folder in folders:
        info = json.loads((folder / "run.json").read_text())
        del info["flops_per_token"]
        (folder / "run.json").write_text(json.dumps(info))
    [note] = [line for line in comparison_table([*map(load_run, folders)]).splitlines() if "reaches a" in line]
    assert "arithmetic" not in note and note.endswith(
        "less time at the speeds measured here. Worth it here: in tokens yes, in time yes."
    )


def test_no_saving_is_said_without_a_baseline_or_for_the_baseline_itself(pair):
    assert "reaches a validation loss" not in comparison_table(pair[:1]) + comparison_table(pair[1:])


def test_loss_over_flops_stretches_each_curve_by_its_arithmetic(pair):
    axes = figures.validation_loss_over_flops(arms(pair)).axes[0]
    ntp, mixed = (line.get_xdata() for line in axes.lines)
    np.testing.assert_allclose(mixed / ntp, 2)
    assert axes.get_xlabel() == "TFLOP"
    np.testing.assert_allclose(ntp[-1], 200 * TOKENS_PER_STEP * 150_000_000 / 1e12)


def test_runs_that_do_not_tell_their_arithmetic_have_no_such_figure(tmp_path):
    folder = write_run(tmp_path / "run")
    info = json.loads((folder / "run.json").read_text())
    del info["flops_per_token"]
    (folder / "run.json").write_text(json.dumps(info))
    assert figures.validation_loss_over_flops(arms([load_run(folder)])) is None


def test_agreement_and_counts_of_concepts_are_shown(tmp_path, pair):
    axes = figures.concept_agreement_over_tokens(arms(pair)).axes[0]
    assert len(axes.lines) == 1
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [100 * (1 - 1 / (1 + s / 100)) for s in (50, 100, 150, 200)])
    assert figures.concept_agreement_over_tokens(arms(pair[:1])) is None
    text = Page(write_report(pair, tmp_path / "out")).text
    for name, value in (
        ("Tokens with a label", "87.5%"),
        ("Labels among the predicted concepts", "66.7%"),
        ("Different concepts in labels", "811"),
        ("Different concepts predicted", "402"),
    ):
        assert name in text and value in text[text.index(name) :][:200]
    assert "Different concepts" not in Page(write_report(pair[:1], tmp_path / "ntp")).text


def test_names_and_settings_of_a_run_cannot_bring_markup_into_the_page(tmp_path):
    hostile = "<script>alert('x')</script>"
    folders = [
        write_run(tmp_path / name, mode, steps=100, name=f"{hostile} & {name}")
        for name, mode in (("first", "none"), ("second", "interleave"))
    ]
    for folder in folders:
        record = json.loads((folder / "run.json").read_text())
        record["config"]["data"] = {"folder": hostile}
        (folder / "run.json").write_text(json.dumps(record))
    content = write_report(list(map(load_run, folders)), tmp_path / "report").read_text()
    assert hostile not in content and "&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; &amp; first" in content
    assert "data.folder=&lt;script&gt;" in content


def test_last_lines_that_a_finished_run_has_lost_are_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cocomix.core.output._noted", set())
    folder = write_run(tmp_path / "run")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    load_run(folder)
    assert not capsys.readouterr().err
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    load_run(folder)
    assert f"{folder} has a finished model, but no last lines in its metrics.jsonl" in capsys.readouterr().err
