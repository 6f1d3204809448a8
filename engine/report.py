"""Comparing training runs: a plain-text table for the terminal and one self-contained HTML page.

Reads what training leaves in a run folder (`run.json`, `metrics.jsonl`). From top to bottom: reading runs, the
comparison, the figures (one function each, listed in `FIGURES`), the page.
"""

import html
import io
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from cocomix.errors import CocomixError
from cocomix.files import atomic_write, read_json

_MODES = {"none": "NTP", "interleave": "CoCoMix", "add": "CoCoMix add"}
_DATA_KEYS = ("vocab_size", "train_tokens", "val_tokens", "val_unigram_perplexity")
_RUN_KEYS = ("name", "mode", "labels", "device", "world_size", "parameters", "tokens_per_step", "total_steps",
             "seq_len", "versions", "config", "data")
_METRIC_KEYS = {
    "train": ("step", "tokens", "ntp_loss", "step_time_s", "tokens_per_s", "peak_memory_gib"),
    "eval": ("step", "tokens", "loss", "perplexity", "elapsed_s"),
    "summary": ("step", "tokens", "loss", "perplexity", "tokens_per_s", "step_time_s", "peak_memory_gib", "elapsed_s"),
}


@dataclass(frozen=True)
class Run:
    """One training run as it lies on disk.

    `info` is `run.json`; `train` and `evaluations` are the lines of `metrics.jsonl` by kind, in order of steps;
    `summary` is None while the run has not finished. Losses are in nats per token.
    """

    folder: Path
    info: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def title(self) -> str:
        """What was trained, in words: "NTP", "CoCoMix (cached labels)", …"""
        labels = self.info["labels"]
        return _MODES[self.info["mode"]] + (f" ({labels} labels)" if labels and self.info["mode"] != "none" else "")

    @property
    def last_step(self) -> int:
        """Optimizer steps done at the last line."""
        return max(record["step"] for record in [*self.train, *self.evaluations])

    @property
    def tokens_per_s(self) -> float | None:
        """Training throughput over all ranks; None before the first training line."""
        return self._typical("tokens_per_s")

    @property
    def step_time_s(self) -> float | None:
        """Median seconds of an optimizer step; None before the first training line."""
        return self._typical("step_time_s")

    @property
    def peak_memory_gib(self) -> float | None:
        """Peak memory in GiB; None before the first training line."""
        if self.summary:
            return self.summary["peak_memory_gib"]
        return max((record["peak_memory_gib"] for record in self.train), default=None)

    def _typical(self, key: str) -> float | None:
        if self.summary:
            return self.summary[key]
        settled = self.train[1:] or self.train  # the first line holds compilation and warm-up
        return statistics.median(record[key] for record in settled) if settled else None


def load_run(folder) -> Run:
    """Read a run folder, finished or still running.

    Where a resumed run went over some steps twice, the later lines count. A last line that is cut off (the run is
    just writing it) is left out. Raises `CocomixError` when the folder holds no run, when a line is broken (named by
    its number) and when there is no evaluation yet.
    """
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise CocomixError(f"{folder} is not a run folder (no run.json in it); name one that `cocomix train` wrote")
    info = read_json(folder / "run.json", "the run's description")
    _check_info(info, folder / "run.json")
    records = _without_repeated_steps(_read_metrics(folder / "metrics.jsonl"))
    of_kind = {kind: [record for record in records if record["kind"] == kind] for kind in _METRIC_KEYS}
    evaluations = {record["tokens"]: record for kind in ("summary", "eval") for record in of_kind[kind]}
    if not evaluations:
        raise CocomixError(f"{folder} has no evaluation yet: wait for its first one (train.eval_every) and try again")
    summary = records[-1] if records[-1]["kind"] == "summary" else None
    return Run(folder, info, of_kind["train"], [evaluations[tokens] for tokens in sorted(evaluations)], summary)


def _check_info(info: dict[str, Any], path: Path) -> None:
    missing = [key for key in _RUN_KEYS if key not in info]
    if isinstance(info.get("data"), dict):
        missing += [f"data.{key}" for key in _DATA_KEYS if key not in info["data"]]
    if missing:
        raise CocomixError(f"{path} lacks {', '.join(missing)}: was it written by another version of cocomix?")
    for key in ("versions", "config", "data"):
        if not isinstance(info[key], dict):
            raise CocomixError(f"{path}: {key} must be a JSON object, not {info[key]!r}")
    if info["mode"] not in list(_MODES):
        raise CocomixError(f"{path}: mode is {info['mode']!r}; it must be one of {', '.join(_MODES)}")
    numbers = {key: info[key] for key in ("world_size", "parameters", "tokens_per_step", "total_steps", "seq_len")}
    for key, value in (numbers | {f"data.{key}": info["data"][key] for key in _DATA_KEYS}).items():
        if not _is_number(value) or not value > 0:
            raise CocomixError(f"{path}: {key} must be a positive number, not {value!r}")


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CocomixError(f"{path} cannot be read: {error}") from None
    records = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):  # no newline yet: the run is just writing this line
                break
            raise CocomixError(f"{path}, line {number} is broken: {error}; remove that line and try again") from None
        if _check_metric(record, f"{path}, line {number}"):
            records.append(record)
    return records


def _check_metric(record, where: str) -> bool:
    """Whether the report reads this kind of line. Raises `CocomixError` where a line lacks what its kind promises."""
    if not isinstance(record, dict) or "kind" not in record:
        raise CocomixError(f"{where} is broken: expected a JSON object with a kind; remove that line and try again")
    for key in _METRIC_KEYS.get(str(record["kind"]), ()):
        if not _is_number(record.get(key)):
            raise CocomixError(f"{where} is broken: {key} is {record.get(key)!r}, not a number; remove that line "
                               "and try again")
    return str(record["kind"]) in _METRIC_KEYS


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _without_repeated_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] > record["step"]:  # resumed from an earlier checkpoint
            kept.pop()
        kept.append(record)
    return list({(record["kind"], record["step"]): record for record in kept}.values())


# ---------------------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True)
class _Comparison:
    heading: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def comparison_table(runs: list[Run]) -> str:
    """Plain-text table of runs at equal training tokens, the largest count at which all have an evaluation.

    The step time ratio is to the first NTP run on the same devices, per token where batch sizes differ. Raises
    `CocomixError` when the perplexities of the runs don't compare.
    """
    comparison = _compare(runs)
    table = [comparison.header, *comparison.rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(comparison.header))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([comparison.heading, "", *lines, "", *comparison.notes])


def _compare(runs: list[Run]) -> _Comparison:
    _check_comparable(runs)
    tokens = _common_tokens(runs)
    at_tokens = [next(e for e in run.evaluations if e["tokens"] == tokens) for run in runs]
    columns = {
        "mode": _titles(runs),
        "perplexity": _significant([evaluation["perplexity"] for evaluation in at_tokens], digits=4),
        "tokens/s": _significant([run.tokens_per_s for run in runs], digits=3),
        "step time ratio": _fixed(_step_time_ratios(runs), decimals=2),
        "peak memory GiB": _fixed([run.peak_memory_gib for run in runs], decimals=2),
        "parameters": [_abbreviated(run.info["parameters"]) for run in runs],
    }
    [unigram] = _significant([runs[0].info["data"]["val_unigram_perplexity"]], digits=4)
    notes = [f"For orientation: the unigram perplexity of the validation text is {unigram}."]
    notes += [f"{title} has not finished: step {run.last_step:,} of {run.info['total_steps']:,}."
              for title, run in zip(columns["mode"], runs, strict=True) if not run.summary]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return _Comparison(f"Validation perplexity after {tokens:,} training tokens", list(columns), rows, notes)


def _check_comparable(runs: list[Run]) -> None:
    if not runs:
        raise CocomixError("no runs to compare: name at least one run folder")
    folders = [run.folder.resolve() for run in runs]
    for run, folder in zip(runs, folders, strict=True):
        if folders.count(folder) > 1:
            raise CocomixError(f"{run.folder} is named twice; name every run once")
    first = _fingerprint(runs[0])
    for run in runs[1:]:
        for key, value in _fingerprint(run).items():
            if value != first[key]:
                raise CocomixError(
                    f"perplexities of {runs[0].folder} and {run.folder} don't compare: {key} is {first[key]} in the "
                    f"first and {value} in the second; compare runs on the same data"
                )


def _fingerprint(run: Run) -> dict[str, Any]:
    """What must agree for two perplexities to mean the same."""
    return {
        "vocab_size": run.info["data"]["vocab_size"],
        "val_tokens": run.info["data"]["val_tokens"],
        "seq_len": run.info["seq_len"],
        "train.eval_windows": _flattened(run.info["config"]).get("train.eval_windows"),
    }


def _common_tokens(runs: list[Run]) -> int:
    common = set.intersection(*({evaluation["tokens"] for evaluation in run.evaluations} for run in runs))
    if not common:
        reached = ", ".join(f"{run.folder}: {run.evaluations[-1]['tokens']:,} tokens" for run in runs)
        raise CocomixError(
            f"the runs have no evaluation at equal tokens (last ones: {reached}); wait for the slower run, or train "
            "with the same train.global_batch and train.eval_every"
        )
    return max(common)


def _step_time_ratios(runs: list[Run]) -> list[float | None]:
    def machine(run):
        return run.info["device"], run.info["world_size"]

    def seconds_per_token(run):
        return run.step_time_s / run.info["tokens_per_step"] if run.step_time_s else None

    ratios = []
    for run in runs:
        baseline = next((r for r in runs if r.info["mode"] == "none" and machine(r) == machine(run)), None)
        reference = seconds_per_token(baseline) if baseline else None
        own = seconds_per_token(run)
        ratios.append(own / reference if own and reference else None)
    return ratios


def _titles(runs: list[Run]) -> list[str]:
    """One distinct title a run: the mode; where modes repeat the run's name too, and else its folder."""
    titles = [run.title for run in runs]
    for distinction in (lambda run: run.info["name"], lambda run: run.folder):
        titles = [f"{title}, {' '.join(str(distinction(run)).split())}" if titles.count(title) > 1 else title
                  for title, run in zip(titles, runs, strict=True)]
    return titles


def _fixed(values: list[float | None], decimals: int) -> list[str]:
    return ["–" if value is None else f"{value:,.{decimals}f}" for value in values]


def _significant(values: list[float | None], digits: int) -> list[str]:
    """A column of numbers with equally many decimals; the smallest has `digits` significant digits."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return _fixed(values, max(digits - 1 - math.floor(math.log10(min(sizes))), 0) if sizes else 0)


def _abbreviated(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return _significant([count / size], digits=3)[0] + letter
    return str(count)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


# ------------------------------------------------------------------------------------------------- the figures

# Okabe and Ito's colours; line styles and markers carry the difference where a printer has no colours.
_LINES = (
    ("#0072B2", "-", "o"), ("#D55E00", "--", "s"), ("#009E73", "-.", "^"), ("#000000", ":", "D"),
    ("#CC79A7", (0, (7, 2, 1, 2, 1, 2)), "v"), ("#E69F00", (0, (9, 3)), "P"), ("#56B4E9", (0, (3, 1, 1, 1)), "X"),
)
_FIGURE_STYLE = {
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "axes.axisbelow": True,
    "axes.edgecolor": "#555555", "grid.color": "#e3e3e3", "grid.linewidth": 0.7, "font.size": 10,
    "lines.linewidth": 1.7, "lines.markersize": 4.5, "savefig.dpi": 160, "svg.fonttype": "none",
    "text.parse_math": False,
}
_TOKEN_UNITS = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1, "tokens"))
_TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
_WARM_UP_SHARE = 0.1  # the first loss values are far above the rest and would flatten it
_MAX_POINTS = 1000  # of a curve, so that the page of a long run stays small


def validation_loss_over_tokens(runs: list[Run]):
    """Figure: validation loss of every run over training tokens, with the loss of a unigram model where it fits."""
    curves = [_series(run.evaluations, "tokens", "loss") for run in runs]
    axes, _ = _draw_curves(runs, curves, _TOKEN_UNITS, "validation loss (nats per token)")
    unigram = math.log(runs[0].info["data"]["val_unigram_perplexity"])
    low, high = axes.get_ylim()
    if low < unigram < high:
        axes.axhline(unigram, color="#777777", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate("unigram", (1, unigram), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
                      ha="right", color="#555555", fontsize=9)
    return axes.figure


def training_loss_over_tokens(runs: list[Run]):
    """Figure: next-token loss of the training batches, smoothed, over the single values. None without values."""
    return _smoothed_figure(runs, "ntp_loss", "training loss (nats per token)")


def validation_loss_over_time(runs: list[Run]):
    """Figure: validation loss of every run over its wall-clock time."""
    curves = [_series(run.evaluations, "elapsed_s", "loss") for run in runs]
    axes, _ = _draw_curves(runs, curves, _TIME_UNITS, "validation loss (nats per token)")
    return axes.figure


def concept_loss_over_tokens(runs: list[Run]):
    """Figure: concept loss of the training batches, smoothed. None where no run predicts concepts."""
    return _smoothed_figure(runs, "concept_loss", "concept loss (nats)")


def throughput_and_memory(runs: list[Run]):
    """Figure: tokens per second and peak memory, one bar a run. None before the first training line."""
    throughput, memory = [run.tokens_per_s for run in runs], [run.peak_memory_gib for run in runs]
    if all(value is None for value in throughput):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.95 + 0.42 * len(runs)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = [_LINES[index % len(_LINES)][0] for index in range(len(runs))]
    rows = range(len(runs))
    for axes, values, texts, title in (
        (panels[0], throughput, _significant(throughput, digits=3), "tokens per second"),
        (panels[1], memory, _fixed(memory, decimals=2), "peak memory (GiB)"),
    ):
        bars = axes.barh(rows, [value or 0 for value in values], color=colors, height=0.6, alpha=0.85)
        axes.bar_label(bars, texts, padding=4)
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.22)
        axes.set_xticks([])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
    panels[0].set_yticks(rows, [_wrapped(title) for title in _titles(runs)])
    panels[0].invert_yaxis()
    return figure


@dataclass(frozen=True)
class _FigureEntry:
    name: str
    title: str
    caption: str
    draw: Callable


FIGURES = (
    _FigureEntry("validation_loss_tokens", "Validation loss over tokens",
                 "What a model has learnt from the same amount of text.", validation_loss_over_tokens),
    _FigureEntry("training_loss_tokens", "Training loss over tokens",
                 "Next-token part of the loss, so that all modes compare. Pale: as logged; strong: moving average.",
                 training_loss_over_tokens),
    _FigureEntry("validation_loss_time", "Validation loss over wall-clock time",
                 "What a model has learnt in the same time, on the device of its run.", validation_loss_over_time),
    _FigureEntry("concept_loss_tokens", "Concept loss over tokens",
                 "Cross-entropy of the predicted concepts against their labels, before its weight. Moving average.",
                 concept_loss_over_tokens),
    _FigureEntry("throughput_memory", "Throughput and memory",
                 "Longer bars are better on the left, shorter ones on the right.", throughput_and_memory),
)


def _smoothed_figure(runs: list[Run], key: str, label: str):
    curves = [_series(run.train, "tokens", key) for run in runs]
    if not any(len(x) for x, _ in curves):
        return None
    smooth = [(x, _moving_average(y, max(1, len(y) // 25))) for x, y in curves]
    axes, scale = _draw_curves(runs, smooth, _TOKEN_UNITS, label)
    for index, (x, y) in enumerate(curves):
        thin = slice(None, None, math.ceil(len(x) / _MAX_POINTS) or 1)
        axes.plot(x[thin] / scale, y[thin], color=_LINES[index % len(_LINES)][0], linewidth=0.7, alpha=0.25, zorder=1)
    return axes.figure


def _series(records: list[dict[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns [n] of the records that have `y` as a finite number."""
    present = [record for record in records if _is_number(record.get(y)) and math.isfinite(record[y])]
    return np.array([record[x] for record in present], float), np.array([record[y] for record in present], float)


def _moving_average(values: np.ndarray, half_width: int) -> np.ndarray:
    """Mean over `half_width` values before and after each.

    Near the start the window shrinks on both sides, since loss falls steeply there; near the end, where it is flat,
    on the right only.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first = place - np.minimum(half_width, place)
    last = place + np.minimum(place - first, len(values) - 1 - place)
    return (sums[last + 1] - sums[first]) / (last + 1 - first)


def _draw_curves(runs: list[Run], curves, units, label: str):
    """A new figure with one curve a run and a legend; returns its axes and what the x values were divided by."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7.2, 3.7 + 0.2 * len(runs)), layout="constrained").subplots()
    longest = max((x[-1] for x, _ in curves if len(x)), default=1.0)
    scale, unit = next(((size, name) for size, name in units if longest >= 1.5 * size), units[-1])
    for index, ((x, y), title) in enumerate(zip(curves, _titles(runs), strict=True)):
        if not len(x):
            continue
        color, line, marker = _LINES[index % len(_LINES)]
        thin = slice(None, None, math.ceil(len(x) / _MAX_POINTS))
        spacing = max(1, len(x[thin]) // 12)
        marks = (index * spacing // len(runs), spacing)  # where curves lie on each other the markers don't
        axes.plot(x[thin] / scale, y[thin], color=color, linestyle=line, marker=marker, label=_wrapped(title),
                  markevery=marks, markerfacecolor="white", markeredgewidth=1.2)
    axes.set(xlabel=unit, ylabel=label)
    _limit_to_settled_values(axes, curves, _WARM_UP_SHARE * longest)
    if axes.lines:
        axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=4, borderaxespad=0.2)
    return axes, scale


def _limit_to_settled_values(axes, curves, start: float) -> None:
    settled = np.concatenate([y[x >= start] for x, y in curves])
    if len(settled):
        low, high = settled.min(), settled.max()
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)


def _wrapped(title: str, width: int = 34) -> str:
    """The title in lines of at most `width` characters, for legends and axes."""
    return "\n".join(textwrap.wrap(title, width))


def _draw_figures(runs: list[Run]) -> list[tuple[_FigureEntry, str, bytes]]:
    """Every figure that the runs have values for, with its SVG element and its PNG bytes."""
    import matplotlib

    drawn = []
    for entry in FIGURES:
        with matplotlib.rc_context(_FIGURE_STYLE | {"svg.hashsalt": entry.name}):
            figure = entry.draw(runs)
            if figure is None:
                continue
            svg, png = io.StringIO(), io.BytesIO()
            figure.savefig(svg, format="svg", metadata={"Date": None})
            figure.savefig(png, format="png")
        drawn.append((entry, _inline_svg(svg.getvalue(), entry), png.getvalue()))
    return drawn


def _inline_svg(document: str, entry: _FigureEntry) -> str:
    """The <svg> element of a document, with ids that stay unique beside other figures on one page."""
    element = document[document.index("<svg"):]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)

    def rename(tag: re.Match) -> str:
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{entry.name}-", tag[0])

    element = re.sub(r"<[^>]+>", rename, element)
    return element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(entry.title)}" ', 1)


# ---------------------------------------------------------------------------------------------------- the page

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: #1b1b1b; background: #fff; max-width: 52rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; }
.quiet, figcaption { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; vertical-align: top; }
th { font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
thead th { border-bottom: 1.5px solid #1b1b1b; vertical-align: bottom; }
tbody th { font-weight: 400; }
tbody tr { border-bottom: 1px solid #e3e3e3; }
.numbers th:first-child { min-width: 14rem; }
.facts td { overflow-wrap: anywhere; }
.facts th:first-child { white-space: nowrap; }
figure { margin: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif
  !important; }
details { border-bottom: 1px solid #e3e3e3; padding: .4rem 0; }
summary { cursor: pointer; }
pre { font: .82rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; margin: .5rem 0 .5rem 1rem; }
@media print {
  body { font-size: 10.5pt; max-width: none; margin: 0; padding: 0; }
  h2 { break-after: avoid; }
  section.figure, tr { break-inside: avoid; }
  .wide { overflow: visible; }
  details::details-content { content-visibility: visible; display: block; }
}
</style>
</head>
<body>
<header>
<h1>$title</h1>
<p class="quiet">$subtitle</p>
</header>
<section>
<h2>$heading</h2>
$comparison
$notes
</section>
$figures
<section>
<h2>Runs</h2>
$facts
</section>
<section>
<h2>Settings</h2>
$settings
</section>
</body>
</html>
""")


def write_report(runs: list[Run], out_folder) -> Path:
    """Write `report.html`, which needs nothing beside it, and its figures as PNG files; returns the page's path.

    Every file appears whole or not at all, the page last. Raises `CocomixError` when the runs don't compare and
    when the folder cannot be written.
    """
    comparison = _compare(runs)
    figures = _draw_figures(runs)
    page = _PAGE.substitute(
        title="Report of a training run" if len(runs) == 1 else f"Comparison of {len(runs)} training runs",
        subtitle=html.escape(_subtitle(runs[0])),
        heading=html.escape(comparison.heading),
        comparison=_html_table(comparison.header, comparison.rows),
        notes="\n".join(f'<p class="quiet">{html.escape(note)}</p>' for note in comparison.notes),
        figures="\n".join(_html_figure(entry, svg) for entry, svg, _ in figures),
        facts=_html_table(["", *_titles(runs)], _facts(runs), "facts"),
        settings=_html_settings(runs),
    )
    return _write_files(Path(out_folder), page, {entry.name: png for entry, _, png in figures})


def _write_files(folder: Path, page: str, figures: dict[str, bytes]) -> Path:
    try:
        for entry in FIGURES:
            path = folder / f"{entry.name}.png"
            if entry.name in figures:
                with atomic_write(path) as file:
                    file.write(figures[entry.name])
            else:
                path.unlink(missing_ok=True)  # an earlier report's, of other runs
        with atomic_write(folder / "report.html") as file:
            file.write(page.encode("utf-8", errors="replace"))
    except OSError as error:
        raise CocomixError(f"the report cannot be written: {error}; choose another folder with --out") from None
    return folder / "report.html"


def _subtitle(run: Run) -> str:
    data = run.info["data"]
    return (f"{_abbreviated(data['train_tokens'])} training tokens and {_abbreviated(data['val_tokens'])} validation "
            f"tokens, vocabulary {data['vocab_size']:,}, windows of {run.info['seq_len']:,} tokens")


def _facts(runs: list[Run]) -> list[list[str]]:
    """Rows of what a run is and where it ran; one column a run after the row's name."""
    packages = list(dict.fromkeys(package for run in runs for package in run.info["versions"]))
    rows = {
        "Name": [run.info["name"] for run in runs],
        "Folder": [run.folder for run in runs],
        "Device": [f"{run.info['world_size']} × {run.info['device']}" for run in runs],
        "Steps": [f"{run.last_step:,} of {run.info['total_steps']:,}" for run in runs],
        "Tokens in a step": [f"{run.info['tokens_per_step']:,}" for run in runs],
        "Step time in s, median": [_step_times(run)[0] for run in runs],
        "Step time in s, p10 – p90": [_step_times(run)[1] for run in runs],
        "Wall-clock time": [_duration(max(e["elapsed_s"] for e in run.evaluations)) for run in runs],
    }
    rows |= {str(package): [run.info["versions"].get(package, "–") for run in runs] for package in packages}
    return [[name, *(str(value) for value in values)] for name, values in rows.items()]


def _step_times(run: Run) -> tuple[str, str]:
    """Median and "p10 – p90" of a step, in seconds."""
    spread = [(run.summary or {}).get(f"step_time_{percentile}_s") for percentile in ("p10", "p90")]
    known = all(_is_number(value) for value in spread)
    median, low, high = _significant([run.step_time_s, *(spread if known else (None, None))], digits=3)
    return median, f"{low} – {high}" if known else "–"


def _html_table(header: list[str], rows: list[list[str]], kind: str = "numbers") -> str:
    """A table whose first column names its rows. All text is escaped here."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>' + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>" for row in rows
    )
    return (f'<div class="wide"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
            "</table></div>")


def _html_figure(entry: _FigureEntry, svg: str) -> str:
    return (f'<section class="figure">\n<h2>{html.escape(entry.title)}</h2>\n<figure>\n{svg}\n'
            f"<figcaption>{html.escape(entry.caption)}</figcaption>\n</figure>\n</section>")


def _html_settings(runs: list[Run]) -> str:
    """What differs between the runs as a table, then every run's settings in full, folded."""
    titles, settings = _titles(runs), [_flattened(run.info["config"]) for run in runs]
    keys = list(dict.fromkeys(key for flat in settings for key in flat))
    differing = [[key, *(flat.get(key, "–") for flat in settings)] for key in keys
                 if key != "train.run" and len({flat.get(key) for flat in settings}) > 1]
    parts = [_html_table(["setting", *titles], differing, "facts")] if differing else []
    parts += [
        f"<details>\n<summary>All settings of {html.escape(title)}</summary>\n<pre>"
        + html.escape("\n".join(f"{key}={value}" for key, value in flat.items())) + "</pre>\n</details>"
        for title, flat in zip(titles, settings, strict=True)
    ]
    return "\n".join(parts)


def _flattened(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as {"section.key": text}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat
