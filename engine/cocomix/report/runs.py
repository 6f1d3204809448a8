"""What training leaves in a run folder: `run.json` and `metrics.jsonl`, read and checked."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocomix.core.errors import CocomixError
from cocomix.core.methods import labels_name, method_title, predicts_concepts, soft_targets_name
from cocomix.core.output import note_once
from cocomix.training.metrics import FILE_NAME as METRICS
from cocomix.training.metrics import read_metrics
from cocomix.training.run_record import FILE_NAME, RunRecord

_KINDS = ("train", "eval", "summary")


@dataclass(frozen=True)
class Run:
    """One training run as it lies on disk.

    `record` is `run.json`; `train` and `evaluations` are the lines of `metrics.jsonl` by kind, in order of steps;
    `summary` is None while the run has not finished. Losses are in nats per token.
    """

    folder: Path
    record: RunRecord
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    summary: dict[str, Any] | None

    @property
    def info(self) -> dict[str, Any]:
        """The record as JSON values by key."""
        return self.record.as_json()

    @property
    def title(self) -> str:
        """What was trained, in words: "NTP", "CoCoMix (cached labels)", …"""
        method, soft, config = self.record.method, self.record.soft_targets, self.record.config
        of_labels = self.record.concept_labels if predicts_concepts(method) else None
        if of_labels and config.get("teacher", {}).get("self_taught_after"):
            of_labels = "self-taught"
        names = (
            labels_name(config.get("teacher", {}).get("labels_by", "attribution")),
            soft_targets_name(config.get("distillation", {}).get("top_k")),
        )
        sources = [f"{kind} {name}" for kind, name in zip((of_labels, soft), names, strict=True) if kind]
        model = config.get("model", {})
        residual, every = model.get("concept_residual", False), model.get("concept_every", 1)
        title = method_title(method, distils=bool(soft), residual=residual, every=every)
        return f"{title} ({', '.join(sources)})" if sources else title

    @property
    def is_baseline(self) -> bool:
        """Whether this is plain next-token prediction, which the others are compared with."""
        return self.record.method == "none" and not self.record.soft_targets

    @property
    def last_step(self) -> int:
        """Optimizer steps done at the last line."""
        return max(record["step"] for record in [*self.train, *self.evaluations])

    @property
    def flops_per_token(self) -> float | None:
        """Floating-point operations of training on a token, labels included; None where the run does not tell."""
        return self.record.flops_per_token

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
    just writing it) is left out, and so are damaged ones, with a word on standard error. Raises `CocomixError` when the
    folder holds no run and when there is no evaluation yet.
    """
    folder = Path(folder)
    if folder.is_file():
        raise CocomixError(
            f"{folder} is a file, not the folder of a run: each profile or benchmark is named after an "
            "option of its own, --profile FILE or --bench FILE"
        )
    if not (folder / FILE_NAME).is_file():
        raise CocomixError(f"{folder} is not a run folder (no {FILE_NAME} in it); name one that `cocomix train` wrote")
    run_record = RunRecord.read(folder)
    lines = read_metrics(folder / METRICS) if (folder / METRICS).exists() else []
    records = _without_repeated_steps([line for line in lines if line["kind"] in _KINDS])
    of_kind = {kind: [record for record in records if record["kind"] == kind] for kind in _KINDS}
    evaluations = {record["tokens"]: record for kind in ("summary", "eval") for record in of_kind[kind]}
    if not evaluations:
        raise CocomixError(f"{folder} has no evaluation yet: wait for its first one (train.eval_every) and try again")
    summary = records[-1] if records[-1]["kind"] == "summary" else None
    if summary is None and (folder / "model" / "config.json").is_file():
        note_once(
            f"{folder} has a finished model, but no last lines in its {METRICS}: they are lost, unless it is being "
            "trained further"
        )
    ordered = [evaluations[tokens] for tokens in sorted(evaluations)]
    return Run(folder, run_record, of_kind["train"], ordered, summary)


def _without_repeated_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for record in records:
        while kept and kept[-1]["step"] > record["step"]:  # resumed from an earlier checkpoint
            kept.pop()
        kept.append(record)
    return list({(record["kind"], record["step"]): record for record in kept}.values())


def titles(runs: list[Run]) -> list[str]:
    """One distinct title for each run: its method, and more where methods repeat."""
    return distinct([run.title for run in runs], runs)


def distinct(titles: list[str], runs: list[Run]) -> list[str]:
    """The titles; where they repeat with the run's name too, and else with its folder."""
    for distinction in (lambda run: run.record.name, lambda run: run.folder):
        titles = [
            f"{title}, {' '.join(str(distinction(run)).split())}" if titles.count(title) > 1 else title
            for title, run in zip(titles, runs, strict=True)
        ]
    return titles


def fixed(values: list[float | None], decimals: int) -> list[str]:
    """A column of numbers with `decimals` decimals; "–" where there is none."""
    return ["–" if value is None else f"{value:,.{decimals}f}" for value in values]


def significant(values: list[float | None], digits: int) -> list[str]:
    """A column of numbers with equally many decimals; the smallest has `digits` significant digits."""
    sizes = [abs(value) for value in values if value and math.isfinite(value)]
    return fixed(values, max(digits - 1 - math.floor(math.log10(min(sizes))), 0) if sizes else 0)
