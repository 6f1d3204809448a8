"""From times to figures: medians with their spread, ratios within one run, rates, targets, and the table.

A *row* is one contestant in one case, as a dict that JSON can hold. Times are seconds as measured, figures are ms,
TFLOP/s, GB/s (1e9) and MiB.
"""

from dataclasses import asdict, dataclass

import numpy as np

FLOOR, PUBLIC = "floor", "public"  # the contestants that every other one is compared with
EXTRA_MEMORY = "extra MiB"


@dataclass(frozen=True)
class Target:
    """`contestant` takes at most `at_most` times as long as `against`, or MiB where `against` is EXTRA_MEMORY."""

    contestant: str
    against: str
    at_most: float

    def __str__(self):
        if self.against == EXTRA_MEMORY:
            return f"≤ {self.at_most:g} MiB extra"
        if self.at_most < 0.5:
            return f"≥ {1 / self.at_most:.3g}x faster than {self.against}"
        return f"≤ {self.at_most:g} x {self.against}"


def spread(values) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def ratio(times, others) -> dict[str, float]:
    """The ratio of the medians; its spread is that of the ratios round by round, which ran beside each other."""
    return spread(np.asarray(times) / np.asarray(others)) | {"median": float(np.median(times) / np.median(others))}


def figures(name: str, case, measured: dict, on_gpu: bool) -> dict:
    """The row of contestant `name`; `measured` maps every contestant of the case that ran to its `Measured`."""
    own, floor = measured[name], measured.get(FLOOR)
    times = spread([1e3 * t for t in own.times])
    row = {
        "operation": case.operation,
        "case": case.name,
        "contestant": name,
        "shape": case.shape,
        "ms": times,
        "rounds": len(own.times),
        "flops": case.flops,
        "flops_formula": case.flops_formula,
        "bytes": case.bytes,
        "bytes_formula": case.bytes_formula,
        "floor_formula": case.floor_formula,
        "tflops": case.flops and case.flops / times["median"] / 1e9,
        "gb_per_s": case.bytes and case.bytes / times["median"] / 1e6,
        "peak_mib": own.peak / 2**20,
        "extra_mib": own.extra / 2**20,
        "errors": own.errors,
        "ratio_to_floor": ratio(own.times, floor.times) if floor else None,
        "speedup_over_public": ratio(measured[PUBLIC].times, own.times) if PUBLIC in measured else None,
    }
    row["targets"] = [judge(target, row, measured, on_gpu) for target in case.targets if target.contestant == name]
    return row


def judge(target: Target, row: dict, measured: dict, on_gpu: bool) -> dict:
    """A target beside what was measured; `met` is None where it does not apply or cannot be told."""
    if target.against == EXTRA_MEMORY:
        value = row["extra_mib"]
    elif target.against in measured:
        value = ratio(measured[target.contestant].times, measured[target.against].times)["median"]
    else:
        value = None
    if not on_gpu:
        verdict = None, "not applicable on a CPU"
    elif value is None:
        verdict = None, f"{target.against} did not run"
    else:
        verdict = (True, "met") if value <= target.at_most else (False, "NOT met")
    return asdict(target) | {"target": str(target), "value": value, "met": verdict[0], "verdict": verdict[1]}


def table(rows: list[dict], absent: list[tuple[str, str, str]]) -> str:
    """The rows by case, as a person reads them. `absent` holds (case title, contestant, reason)."""
    header = ("contestant", "ms", "p10-p90", "TFLOP/s", "GB/s", "peak MiB", "extra MiB", "x floor", "x faster", "")
    cells = {title(row): [] for row in rows} | {case: [] for case, *_ in absent}
    for row in rows:
        cells[title(row)].append(_cells(row))
    for case, name, reason in absent:
        cells[case].append((name, "-", "", "", "", "", "", "", "", reason))
    everything = [header, *(line for lines in cells.values() for line in lines)]
    widths = [max(len(line[i]) for line in everything) for i in range(len(header))]
    parts = [_line(header, widths)]
    for case, lines in cells.items():
        parts += ["", case, *(_line(line, widths) for line in lines)]
    formulas = {f"{row['operation']}: {text}": None for row in rows for text in _formulas(row)}
    return "\n".join([*parts, "", *formulas])


def title(row: dict) -> str:
    """The heading under which a row stands."""
    return f"{row['operation']} {row['case']}"


def _line(cells, widths):
    first, *rest = cells
    numbers = "  ".join(cell.rjust(width) for cell, width in zip(rest[:-1], widths[1:-1], strict=True))
    return f"  {first.ljust(widths[0])}  {numbers}  {rest[-1]}".rstrip()


def _cells(row):
    times, floor, faster = row["ms"], row["ratio_to_floor"], row["speedup_over_public"]
    verdicts = [f"{one['target']}: {one['verdict']}" for one in row["targets"]]
    return (
        row["contestant"],
        _short(times["median"]),
        f"{_short(times['p10'])}-{_short(times['p90'])}",
        _short(row["tflops"]),
        _short(row["gb_per_s"]),
        _short(row["peak_mib"]),
        _short(row["extra_mib"]),
        _ratio_cell(floor),
        _ratio_cell(faster),
        "; ".join(verdicts),
    )


def _ratio_cell(value):
    return "" if value is None else f"{value['median']:.2f} ({value['p10']:.2f}-{value['p90']:.2f})"


def _short(value):
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _formulas(row):
    for what in ("flops", "bytes", "floor"):
        if row[f"{what}_formula"]:
            yield f"{what} = {row[f'{what}_formula']}"
