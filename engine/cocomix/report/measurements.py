"""Benchmarks on disk, the JSON of pytest-benchmark, read and compared."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json

_ROW_KEYS = ("operation", "case", "contestant", "shape", "ms")


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
    """Read what `make bench` left. Raises `CocomixError` for a file of another kind."""
    content = read_json(path, "the benchmark file")
    found = content.get("benchmarks")
    if not isinstance(found, list):
        raise CocomixError(f"{path} does not hold benchmarks: expected what pytest-benchmark writes (make bench)")
    rows = [entry.get("extra_info") for entry in found if isinstance(entry, dict)]
    rows = [row for row in rows if isinstance(row, dict) and all(key in row for key in _ROW_KEYS)]
    if not rows:
        raise CocomixError(f"{path} holds no figures of cocomix's benchmarks: it lists {len(found)} others")
    return Benchmarks(Path(path), content.get("machine_info", {}).get("cocomix", {}), rows)


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
