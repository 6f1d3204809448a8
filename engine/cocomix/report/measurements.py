"""Benchmarks on disk, the JSON of pytest-benchmark, read and compared."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json
from cocomix.core.records import Positive, as_record


@dataclass(frozen=True)
class _Spread:
    median: Positive
    p10: Positive
    p90: Positive


@dataclass(frozen=True)
class _Row:
    """What each row holds at least."""

    operation: str
    case: str
    contestant: str
    shape: dict[str, Any]
    ms: _Spread
    ratio_to_floor: _Spread | None = None
    floor_formula: str | None = None


@dataclass(frozen=True)
class _Machine:
    cocomix: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Bench:
    extra_info: dict[str, Any]


@dataclass(frozen=True)
class _File:
    """What pytest-benchmark writes, as far as it is read."""

    benchmarks: list[_Bench]
    machine_info: _Machine = field(default_factory=_Machine)


@dataclass(frozen=True)
class Benchmarks:
    """The rows of one benchmark run: one a contestant in a case, as `benchmarks/` describes them."""

    path: Path
    machine: dict[str, Any]
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Change:
    """A contestant in two benchmark runs. `ratio` is its new time over its old one, both over their floor where there
    is one, since that takes out what the machine itself does. `verdict` is "slower" or "faster" where the spreads of
    the two (10th to 90th percentile) do not touch, "same" otherwise."""

    title: str
    contestant: str
    old: dict[str, float]
    new: dict[str, float]
    unit: str  # "x floor" or "ms"

    @property
    def ratio(self) -> float:
        return self.new["median"] / self.old["median"]

    @property
    def verdict(self) -> str:
        if self.new["p10"] > self.old["p90"]:
            return "slower"
        return "faster" if self.new["p90"] < self.old["p10"] else "same"


def load_benchmarks(path) -> Benchmarks:
    """Read what `make bench` left. Raises `CocomixError` for a file of another kind, and for rows that lack figures or
    hold impossible ones."""
    content = read_json(path, "the benchmark file")
    if not isinstance(content.get("benchmarks"), list):
        raise CocomixError(f"{path} does not hold benchmarks: expected what pytest-benchmark writes (make bench)")
    file = as_record(_File, content, path, "expected what pytest-benchmark writes (make bench)")
    rows = [entry.extra_info for entry in file.benchmarks if "contestant" in entry.extra_info]
    if not rows:
        raise CocomixError(f"{path} holds no figures of cocomix's benchmarks: it lists {len(file.benchmarks)} others")
    for row in rows:
        as_record(_Row, row, f"{path}, {row.get('operation')} {row.get('case')}", "measure it again (make bench)")
    return Benchmarks(Path(path), file.machine_info.cocomix, rows)


def compare(old: Benchmarks, new: Benchmarks) -> list[Change]:
    """Every contestant that both runs measured, floors aside, in the order of the new run. Raises `CocomixError` where
    there is none, and where the runs are of different devices."""
    devices = [run.machine.get("device") for run in (old, new)]
    if devices[0] != devices[1]:
        raise CocomixError(
            f"{old.path} was measured on {devices[0]} and {new.path} on {devices[1]}: compare files of one device"
        )
    before = {_identity(row): row for row in old.rows}
    changes = []
    for row in new.rows:
        earlier = before.get(_identity(row))
        if earlier is None or row["contestant"] == "floor":
            continue
        over_floor = bool(row.get("ratio_to_floor") and earlier.get("ratio_to_floor"))
        key, unit = ("ratio_to_floor", "x floor") if over_floor else ("ms", "ms")
        changes.append(Change(f"{row['operation']} {row['case']}", row["contestant"], earlier[key], row[key], unit))
    if not changes:
        raise CocomixError(f"{old.path} and {new.path} have no benchmark in common")
    return changes


def _identity(row):
    return row["operation"], row["case"], row["contestant"], json.dumps(row["shape"], sort_keys=True)
