"""The figures that compare training runs: one function each, listed in `FIGURES`, drawn as SVG and PNG."""

import html
import io
import math
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from cocomix.core.extras import needs
from cocomix.core.records import is_number
from cocomix.report.arms import Arm, arm_titles
from cocomix.report.runs import fixed, significant

# Okabe and Ito's colours; line styles and markers carry the difference where a printer has no colours.
LINES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#000000", ":", "D"),
    ("#CC79A7", (0, (7, 2, 1, 2, 1, 2)), "v"),
    ("#E69F00", (0, (9, 3)), "P"),
    ("#56B4E9", (0, (3, 1, 1, 1)), "X"),
    ("#882255", "-", "p"),
    ("#44AA99", "--", "h"),
    ("#7F3C8D", "-.", "<"),
    ("#A6761D", ":", ">"),
    ("#666666", "-", "*"),
)
_FIGURE_STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "axes.edgecolor": "#555555",
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.7,
    "font.size": 10,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "savefig.dpi": 160,
    "svg.fonttype": "none",
    "text.parse_math": False,
}
_TOKEN_UNITS = ((1e9, "billion tokens"), (1e6, "million tokens"), (1e3, "thousand tokens"), (1, "tokens"))
_FLOP_UNITS = ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"))
_TIME_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))
_WARM_UP_SHARE = 0.1  # the first loss values are far above the rest and would flatten it
_MAX_POINTS = 1000  # of a curve, so that the page of a long run stays small


def validation_loss_over_tokens(arms: list[Arm]):
    """Figure: validation loss of every method over training tokens, with the loss of a unigram model where it fits."""
    curves = [_series(arm.evaluations, "tokens", "loss") for arm in arms]
    axes, scale = _draw_curves(arms, curves, _TOKEN_UNITS, "validation loss (nats per token)")
    _draw_bands(axes, scale, arms, curves)
    unigram = math.log(arms[0].first.info["data"]["val_unigram_perplexity"])
    low, high = axes.get_ylim()
    if low < unigram < high:
        axes.axhline(unigram, color="#777777", linewidth=1, linestyle=(0, (1, 2)))
        axes.annotate(
            "unigram",
            (1, unigram),
            (0, 3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            color="#555555",
            fontsize=9,
        )
    return axes.figure


def training_loss_over_tokens(arms: list[Arm]):
    """Figure: next-token loss of the training batches, smoothed, over the single values. None without values."""
    return _smoothed_figure(arms, "ntp_loss", "training loss (nats per token)")


def validation_loss_over_time(arms: list[Arm]):
    """Figure: validation loss of every method over its wall-clock time."""
    curves = [_series(arm.evaluations, "elapsed_s", "loss") for arm in arms]
    axes, scale = _draw_curves(arms, curves, _TIME_UNITS, "validation loss (nats per token)")
    _draw_bands(axes, scale, arms, curves)
    return axes.figure


def validation_loss_over_flops(arms: list[Arm]):
    """Figure: validation loss of every method over the arithmetic of its training. None where a run does not tell."""
    if any(arm.first.flops_per_token is None for arm in arms):
        return None
    curves = []
    for arm in arms:
        tokens, loss = _series(arm.evaluations, "tokens", "loss")
        curves.append((np.array([arm.flops(count) for count in tokens], float), loss))
    axes, scale = _draw_curves(arms, curves, _FLOP_UNITS, "validation loss (nats per token)")
    _draw_bands(axes, scale, arms, curves)
    return axes.figure


def concept_agreement_over_tokens(arms: list[Arm]):
    """Figure: share of the labels that are among the predicted concepts. None where no run predicts concepts."""
    curves = [_series(arm.evaluations, "tokens", "concept_agreement") for arm in arms]
    if not any(len(x) for x, _ in curves):
        return None
    axes, _ = _draw_curves(arms, [(x, 100 * y) for x, y in curves], _TOKEN_UNITS, "labels that are predicted (%)")
    return axes.figure


def concept_loss_over_tokens(arms: list[Arm]):
    """Figure: concept loss of the training batches, smoothed. None where no run predicts concepts."""
    return _smoothed_figure(arms, "concept_loss", "concept loss (nats)")


def distillation_loss_over_tokens(arms: list[Arm]):
    """Figure: distance from the teacher on training batches, smoothed. None where no run is distilled."""
    return _smoothed_figure(arms, "distillation_loss", "KL from the teacher (nats per token)")


def throughput_and_memory(arms: list[Arm]):
    """Figure: tokens per second and peak memory, one bar a method. None before the first training line."""
    throughput, memory = [arm.tokens_per_s for arm in arms], [arm.peak_memory_gib for arm in arms]
    if all(value is None for value in throughput):
        return None
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.95 + 0.42 * len(arms)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = [LINES[index % len(LINES)][0] for index in range(len(arms))]
    rows = range(len(arms))
    for axes, values, texts, title in (
        (panels[0], throughput, significant(throughput, digits=3), "tokens per second"),
        (panels[1], memory, fixed(memory, decimals=2), "peak memory (GiB)"),
    ):
        bars = axes.barh(rows, [value or 0 for value in values], color=colors, height=0.6, alpha=0.85)
        axes.bar_label(bars, texts, padding=4)
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.22)
        axes.set_xticks([])
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        axes.tick_params(length=0)
    panels[0].set_yticks(rows, [wrapped(title) for title in arm_titles(arms)])
    panels[0].invert_yaxis()
    return figure


@dataclass(frozen=True)
class FigureEntry:
    """A figure of the page: file name, title, caption, and the function that draws it (None: nothing to show)."""

    name: str
    title: str
    caption: str
    draw: Callable


FIGURES = (
    FigureEntry(
        "validation_loss_tokens",
        "Validation loss over tokens",
        "What a model has learnt from the same amount of text.",
        validation_loss_over_tokens,
    ),
    FigureEntry(
        "training_loss_tokens",
        "Training loss over tokens",
        "Next-token part of the loss, so that all methods compare. Pale: as logged; strong: moving average.",
        training_loss_over_tokens,
    ),
    FigureEntry(
        "validation_loss_flops",
        "Validation loss over arithmetic",
        "What a model has learnt from the same number of floating-point operations that its method needs, "
        "labels included where they are computed while training.",
        validation_loss_over_flops,
    ),
    FigureEntry(
        "validation_loss_time",
        "Validation loss over wall-clock time",
        "What a model has learnt in the same time, on the device of its run.",
        validation_loss_over_time,
    ),
    FigureEntry(
        "concept_loss_tokens",
        "Concept loss over tokens",
        "Cross-entropy of the predicted concepts against their labels, before its weight. Moving average.",
        concept_loss_over_tokens,
    ),
    FigureEntry(
        "concept_agreement_tokens",
        "Agreement on concepts",
        "Share of the teacher's labels that are among the concepts which the student predicts.",
        concept_agreement_over_tokens,
    ),
    FigureEntry(
        "distillation_loss_tokens",
        "Distance from the teacher over tokens",
        "KL divergence of the student's next-token distribution from the teacher's, before its weight; where "
        "soft targets hold the likeliest tokens alone, of those and the rest as one. Moving average.",
        distillation_loss_over_tokens,
    ),
    FigureEntry(
        "throughput_memory",
        "Throughput and memory",
        "Longer bars are better on the left, shorter ones on the right.",
        throughput_and_memory,
    ),
)


def _smoothed_figure(arms: list[Arm], key: str, label: str):
    curves = [_series(arm.train, "tokens", key) for arm in arms]
    if not any(len(x) for x, _ in curves):
        return None
    smooth = [(x, _moving_average(y, max(1, len(y) // 25))) for x, y in curves]
    axes, scale = _draw_curves(arms, smooth, _TOKEN_UNITS, label)
    for index, (x, y) in enumerate(curves):
        thin = slice(None, None, math.ceil(len(x) / _MAX_POINTS) or 1)
        axes.plot(x[thin] / scale, y[thin], color=LINES[index % len(LINES)][0], linewidth=0.7, alpha=0.25, zorder=1)
    return axes.figure


def _series(records: list[dict[str, Any]], x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns [n] of the records that have `y` as a finite number."""
    present = [record for record in records if is_number(record.get(y)) and math.isfinite(record[y])]
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


def _draw_curves(arms: list[Arm], curves, units, label: str):
    """A new figure with one curve an arm and a legend; returns its axes and what the x values were divided by."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7.2, 3.7 + 0.2 * len(arms)), layout="constrained").subplots()
    longest = max((x[-1] for x, _ in curves if len(x)), default=1.0)
    scale, unit = next(((size, name) for size, name in units if longest >= 1.5 * size), units[-1])
    for index, ((x, y), title) in enumerate(zip(curves, arm_titles(arms), strict=True)):
        if not len(x):
            continue
        color, line, marker = LINES[index % len(LINES)]
        thin = slice(None, None, math.ceil(len(x) / _MAX_POINTS))
        spacing = max(1, len(x[thin]) // 12)
        marks = (index * spacing // len(arms), spacing)  # where curves lie on each other the markers don't
        axes.plot(
            x[thin] / scale,
            y[thin],
            color=color,
            linestyle=line,
            marker=marker,
            label=wrapped(title),
            markevery=marks,
            markerfacecolor="white",
            markeredgewidth=1.2,
        )
    axes.set(xlabel=unit, ylabel=label)
    _limit_to_settled_values(axes, curves, _WARM_UP_SHARE * longest)
    if axes.lines:
        axes.figure.legend(loc="outside upper left", ncols=2, frameon=False, handlelength=4, borderaxespad=0.2)
    return axes, scale


def _draw_bands(axes, scale, arms: list[Arm], curves) -> None:
    """Between the best and the worst seed, where an arm has several."""
    for index, (arm, (x, _)) in enumerate(zip(arms, curves, strict=True)):
        low, high = (_series(arm.evaluations, "tokens", key)[1] for key in ("loss_low", "loss_high"))
        if len(low) == len(x):
            axes.fill_between(x / scale, low, high, color=LINES[index % len(LINES)][0], alpha=0.18, linewidth=0)


def _limit_to_settled_values(axes, curves, start: float) -> None:
    settled = np.concatenate([y[x >= start] for x, y in curves])
    if len(settled):
        low, high = settled.min(), settled.max()
        margin = 0.05 * (high - low) or 0.5
        axes.set_ylim(low - margin, high + margin)


def wrapped(title: str, width: int = 34) -> str:
    """The title in lines of at most `width` characters, for legends and axes."""
    return "\n".join(textwrap.wrap(title, width))


def draw_figures(arms: list[Arm]) -> list[tuple[FigureEntry, str, bytes]]:
    """Every figure that the arms have values for, with its SVG element and its PNG bytes."""
    return [drawn for entry in FIGURES if (drawn := draw(entry, arms)) is not None]


def draw(entry: FigureEntry, *arguments) -> tuple[FigureEntry, str, bytes] | None:
    """A figure of `arguments` with its SVG element and its PNG bytes; None where there is nothing to show."""
    with needs("the figures of a report", "matplotlib", "cocomix[report]"):
        import matplotlib

    with matplotlib.rc_context(cast(Any, _FIGURE_STYLE | {"svg.hashsalt": entry.name})):
        figure = entry.draw(*arguments)
        if figure is None:
            return None
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(png, format="png")
    return entry, _inline_svg(svg.getvalue(), entry), png.getvalue()


def _inline_svg(document: str, entry: FigureEntry) -> str:
    """The <svg> element of a document, with ids that stay unique beside other figures on one page."""
    element = document[document.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)

    def rename(tag: re.Match) -> str:
        return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{entry.name}-", tag[0])

    element = re.sub(r"<[^>]+>", rename, element)
    return element.replace("<svg ", f'<svg role="img" aria-label="{html.escape(entry.title)}" ', 1)
