"""Figures of measurements: where a step goes, benchmarks against their floor, and how times grow with a shape."""

import math
import re
from collections import defaultdict
from typing import Any

from cocomix.costs.profile_results import ProfileResults
from cocomix.report.figures import LINES, wrapped

# By part: colour and hatch; the backward pass of a part has its colour, paler.
_PARTS = {
    "teacher and labels": ("#999999", ""),
    "embeddings": ("#F0E442", ""),
    "h blocks": ("#56B4E9", ""),
    "concept head": ("#D55E00", "//"),
    "mixing": ("#CC79A7", "xx"),
    "f blocks": ("#0072B2", ""),
    "LM head and loss": ("#009E73", "\\\\"),
    "optimizer": ("#E69F00", ".."),
    "communication": ("#000000", ""),
    "other": ("#DDDDDD", ""),
}
_BACKWARD = ", backward"
_SWEPT = {"N": "tokens N", "d": "width d", "C": "concepts C", "k": "kept concepts k", "T": "window length T"}

_DIMENSION = re.compile(r"-?\b[A-Za-z]{1,2}\d+\b")  # n65536, d512 in the name of a case


def step_parts(profile: ProfileResults):
    """Figure: a bar a method, stacked by the parts of a step as shares of it. None where they were not measured."""
    from matplotlib.figure import Figure

    methods = {name: method.parts for name, method in profile.methods.items() if method.parts}
    if not methods:
        return None
    figure = Figure(figsize=(7.2, 1.9 + 0.5 * len(methods)), layout="constrained")
    axes = figure.subplots()
    totals = [sum(parts.values()) for parts in methods.values()]
    left = [0.0] * len(methods)
    for name in dict.fromkeys(name for parts in methods.values() for name in parts):
        color, hatch = _PARTS.get(name.removesuffix(_BACKWARD), ("#ffffff", ""))
        shares = [100 * parts.get(name, 0.0) / total for parts, total in zip(methods.values(), totals, strict=True)]
        bars = axes.barh(
            range(len(methods)),
            shares,
            left=left,
            color=color,
            hatch=hatch,
            edgecolor="white",
            alpha=0.5 if name.endswith(_BACKWARD) else 1.0,
            linewidth=0.8,
            height=0.62,
            label=name,
        )
        axes.bar_label(
            bars, [f"{share:.0f}" if share >= 4 else "" for share in shares], label_type="center", fontsize=8
        )
        left = [start + share for start, share in zip(left, shares, strict=True)]
    for y, total in enumerate(totals):
        axes.annotate(f"{1e3 * total:,.0f} ms", (100, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
    axes.set_yticks(range(len(methods)), [wrapped(profile.methods[name].title) for name in methods])
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set(xlabel="share of a step (%)", xlim=(0, 112), xticks=range(0, 101, 20))
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return figure


def against_floor(rows: list[dict[str, Any]]):
    """Figure: the contestants of one operation, their time over the floor's, with the 10th to 90th percentile."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["contestant"] != "floor" and row.get("ratio_to_floor")]
    if not rows:
        return None
    figure = Figure(figsize=(7.2, 1.0 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    contestants = list(dict.fromkeys(row["contestant"] for row in rows))
    for y, row in enumerate(rows):
        found = row["ratio_to_floor"]
        color, _, marker = LINES[contestants.index(row["contestant"]) % len(LINES)]
        median = found["median"]
        # the ratio of the medians may lie outside the percentiles of the ratios
        reach = [[max(median - found["p10"], 0)], [max(found["p90"] - median, 0)]]
        axes.errorbar(median, y, xerr=reach, color=color, marker=marker, capsize=3, markerfacecolor="white", zorder=3)
        axes.annotate(
            f"{median:.2f}", (max(found["p90"], median), y), (6, 0), textcoords="offset points", va="center", fontsize=8
        )
    axes.axvline(1, color="#777777", linewidth=1, linestyle=(0, (1, 2)))
    axes.set_yticks(range(len(rows)), [wrapped(f"{row['case']}: {row['contestant']}", 44) for row in rows])
    axes.margins(x=0.12)
    axes.set(xlabel="time over the floor's", xlim=(0, None), ylim=(len(rows) - 0.4, -0.6))
    return figure


def sweeps(rows: list[dict[str, Any]]) -> dict[str, list[list[dict[str, Any]]]]:
    """By dimension, the groups of at least three rows of one operation and contestant whose shapes differ in it alone;
    each group in order of the dimension."""
    found = {}
    for key in _SWEPT:
        groups = defaultdict(list)
        for row in rows:
            shape = row["shape"]
            if isinstance(shape.get(key), int):
                rest = tuple(sorted((name, str(value)) for name, value in shape.items() if name != key))
                kind = _DIMENSION.sub("", row["case"])
                groups[row["operation"], row["contestant"], kind, rest].append(row)
        kept = [sorted(group, key=lambda row: row["shape"][key]) for group in groups.values()]
        kept = [group for group in kept if len({row["shape"][key] for row in group}) >= 3]
        if kept:
            found[key] = kept
    return found


def sweep(key: str, groups: list[list[dict[str, Any]]]):
    """Figure: milliseconds over the dimension `key`, both axes logarithmic. A panel holds one operation at one shape,
    with a line a contestant; a contestant looks the same in all panels."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    panels = defaultdict(list)
    for group in groups:
        panels[_panel_title(key, group[0])].append(group)
    names = list(dict.fromkeys(group[0]["contestant"] for group in groups))
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.8 * columns if columns > 1 else 6.0, 0.6 + 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (title, members) in zip(grid, panels.items(), strict=False):
        for group in members:
            _sweep_line(axes, key, group, LINES[names.index(group[0]["contestant"]) % len(LINES)])
        axes.set_title(title, fontsize=9, loc="left")
        axes.set(xlabel=_SWEPT[key], ylabel="milliseconds", xscale="log", yscale="log")
        values = sorted({row["shape"][key] for group in members for row in group})
        axes.set_xticks(values, [f"{value:,}" for value in values], fontsize=8)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    handles = {line.get_label(): line for axes in grid for line in axes.lines}
    figure.legend(handles=list(handles.values()), loc="outside upper left", ncols=5, frameon=False, handlelength=4)
    return figure


def _panel_title(key: str, row: dict[str, Any]) -> str:
    """The operation and the mode, and below them the dimensions that stay."""
    kind = _DIMENSION.sub("", row["case"]).strip("-")
    stay = [f"{name} {value:,}" for name, value in row["shape"].items() if isinstance(value, int) and name != key]
    return f"{row['operation']}: {kind}\n{', '.join(stay)}"


def _sweep_line(axes, key: str, group: list[dict[str, Any]], style) -> None:
    color, line, marker = style
    x = [row["shape"][key] for row in group]
    median, low, high = ([row["ms"][name] for row in group] for name in ("median", "p10", "p90"))
    axes.plot(
        x, median, color=color, linestyle=line, marker=marker, markerfacecolor="white", label=group[0]["contestant"]
    )
    axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0)
