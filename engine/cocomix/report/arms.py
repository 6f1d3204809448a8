"""Runs of one method as one line of a comparison: the mean of its seeds with their spread, at one budget or several."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from cocomix.core.config import current_name
from cocomix.core.records import is_number
from cocomix.report.runs import Run, distinct
from cocomix.training.resume import LEAVES_TRAJECTORY

_SEED, _BUDGET = "train.seed", "train.tokens"
_OF_TEACHER = ("teacher", "sae", "concept_labels", "distillation")  # where labels and soft targets come from


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed and their budget, train.tokens.

    Where each seed has one run, its curve is that run's; where seeds have several budgets, the curve holds the runs'
    ends, for what lies before an end had a learning rate that was not yet low.
    """

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run that stands for all where they are alike: device, parameters, data, arithmetic."""
        return self.runs[0]

    @property
    def title(self) -> str:
        """The method, and how many seeds and budgets there are where there are several."""
        counts = [(len(self._by_seed), "seeds"), (len(_budgets(self.runs)), "budgets")]
        return ", ".join([self.first.title, *(f"{count} {what}" for count, what in counts if count > 1)])

    @property
    def has_budgets(self) -> bool:
        """Whether the curve holds ends of runs, each with a rate that has fallen, and not one run's way to its end."""
        return len(_budgets(self.runs)) > 1

    @property
    def is_baseline(self) -> bool:
        """Whether this is plain next-token prediction."""
        return self.first.is_baseline

    @property
    def _by_seed(self) -> dict[Any, list[Run]]:
        found: dict[Any, list[Run]] = {}
        for run in self.runs:
            found.setdefault(setting(run, _SEED), []).append(run)
        return found

    @cached_property
    def curves(self) -> dict[Any, list[dict[str, Any]]]:
        """Evaluations by seed, in order of tokens."""
        if not self.has_budgets:
            return {seed: run.evaluations for seed, (run,) in self._by_seed.items()}
        return {
            seed: [run.evaluations[-1] for run in sorted(runs, key=_budget)] for seed, runs in self._by_seed.items()
        }

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The evaluations at token counts that all seeds have: of each number the mean over seeds, and of the loss also
        `loss_low` and `loss_high`, those of the best and of the worst seed."""
        if len(self.curves) == 1:
            return next(iter(self.curves.values()))
        by_tokens = [{record["tokens"]: record for record in curve} for curve in self.curves.values()]
        common = set.intersection(*(set(curve) for curve in by_tokens))
        return [_mean_evaluation([curve[tokens] for curve in by_tokens]) for tokens in sorted(common)]

    @property
    def train(self) -> list[dict[str, Any]]:
        """Training lines: the means over seeds at one budget, those of the longest run where there are several."""
        if self.has_budgets:
            return max(self.runs, key=_budget).train
        by_step = [{record["step"]: record for record in run.train} for run in self.runs]
        common = set.intersection(*(set(lines) for lines in by_step))
        return [_means([lines[step] for lines in by_step]) for step in sorted(common)]

    @property
    def tokens_per_s(self) -> float | None:
        """Median over the runs that tell."""
        return self._typical(lambda run: run.tokens_per_s)

    @property
    def step_time_s(self) -> float | None:
        """Median over the runs that tell."""
        return self._typical(lambda run: run.step_time_s)

    @property
    def peak_memory_gib(self) -> float | None:
        """The largest of the runs' peaks."""
        return max((run.peak_memory_gib for run in self.runs if run.peak_memory_gib is not None), default=None)

    def flops(self, tokens: float) -> float | None:
        """Floating-point operations until `tokens` tokens, those of a run that ends there where there are budgets, and
        in a straight line between such ends; None where a run does not tell."""
        if not self.has_budgets:
            return self.first.record.flops(tokens)
        ends = {_budget(run): run.record.flops(_budget(run)) for run in self.runs}
        known = {budget: flops for budget, flops in sorted(ends.items()) if flops is not None}
        if len(known) < len(ends):
            return None
        return float(np.interp(tokens, [0.0, *known], [0.0, *known.values()]))

    def _typical(self, figure: Callable[[Run], float | None]) -> float | None:
        known = [value for run in self.runs if (value := figure(run)) is not None]
        return statistics.median(known) if known else None


def arms(runs: Iterable[Run]) -> list[Arm]:
    """The runs by method, in the order of their first ones. Runs stay apart where they repeat a seed and a budget, or
    have no evaluation at equal tokens, and so do unfinished ones where there are several budgets, since only the end of
    such a run tells."""
    alike: dict[tuple, list[Run]] = {}
    for run in runs:
        alike.setdefault((run.title, _method_settings(run)), []).append(run)
    found = []
    for group in alike.values():
        together = _together(group)
        found += [Arm(tuple(together))] if together else []
        found += [Arm((run,)) for run in group if run not in together]
    return found


def _together(group: list[Run]) -> list[Run]:
    """Those of a method's runs that make one arm."""
    if len({(setting(run, _SEED), _budget(run)) for run in group}) < len(group):
        return []
    finished = group if len(_budgets(group)) == 1 else [run for run in group if run.summary]
    return finished if finished and Arm(tuple(finished)).evaluations else []


def arm_titles(compared: list[Arm]) -> list[str]:
    """One distinct title for each arm."""
    return distinct([arm.title for arm in compared], [arm.first for arm in compared])


def setting(run: Run, name: str) -> Any:
    """A setting of the run by its full name, None where it has none."""
    section, _, key = name.partition(".")
    value = run.record.config.get(section, {})
    return value.get(key) if isinstance(value, dict) else None


def _budget(run: Run) -> int:
    return run.record.total_steps * run.record.tokens_per_step


def _budgets(runs: Iterable[Run]) -> set[int]:
    return {_budget(run) for run in runs}


def _method_settings(run: Run) -> tuple:
    """What makes two runs the same method: their teacher, where that is not their own, and every setting that decides
    about the trajectory, but seed and budget."""
    aside = [_SEED, _BUDGET, *(name for name in LEAVES_TRAJECTORY if name.split(".")[0] not in _OF_TEACHER)]
    if setting(run, "teacher.self_taught_after"):
        aside += ["teacher.model", "teacher.sae"]
    flat = {}
    for section, value in run.record.config.items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            name = current_name(f"{section}.{key}" if key else section)
            if not any(name == left or name.startswith(f"{left}.") for left in aside):
                flat[name] = repr(inner)
    return tuple(sorted(flat.items()))


def _mean_evaluation(records: list[dict[str, Any]]) -> dict[str, Any]:
    losses = [record["loss"] for record in records]
    return _means(records) | {"loss_low": min(losses), "loss_high": max(losses)}


def _means(records: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each number that all records have; where they agree, as steps and tokens do, that number."""
    shared = [key for key in records[0] if all(is_number(record.get(key)) for record in records)]
    values = {key: [record[key] for record in records] for key in shared}
    return {key: found[0] if len(set(found)) == 1 else statistics.fmean(found) for key, found in values.items()}
