"""`cocomix report --json`: the comparison of runs as data, for tables and pictures of one's own."""

import dataclasses
from typing import Any

from cocomix.core.files import AnyPath, write_json
from cocomix.core.machine import commit
from cocomix.report.arms import Arm, arm_titles, arms
from cocomix.report.report import step_time_ratios
from cocomix.report.runs import Run
from cocomix.report.token_saving import arithmetic_ratio, arm_saving


def write_comparison(path: AnyPath, runs: list[Run]) -> None:
    """Write `comparison(runs)`. Raises `CocomixError` where the file cannot be written."""
    write_json(path, comparison(runs))


def comparison(runs: list[Run]) -> dict[str, Any]:
    """JSON values: `commit`, `validation_tokens`, `unigram_perplexity`, and `arms`, one a method.

    An arm has `title`, `device`, `ranks`, `parameters`, `flops_per_token`, `supervision_flops_per_token` (of that the
    teacher's work, which a cached run does not do), `tokens_per_s`, `step_time_ratio` (a token's time over NTP's on the
    same devices), `peak_memory_gib`, `runs` (their folders), `curves` (by seed: tokens and validation loss), `points`
    (over all seeds: tokens, arithmetic, mean, best and worst loss), and `saving` against NTP: see
    `token_saving.Saving`, with `arithmetic` and `time`, what is saved of those. None where something is not known.
    """
    compared = arms(runs)
    baseline = next((arm for arm in compared if arm.is_baseline), None)
    ratios = step_time_ratios(compared)
    return {
        "kind": "comparison",
        "commit": commit(),
        "validation_tokens": runs[0].record.data.val_tokens,
        "unigram_perplexity": runs[0].record.data.val_unigram_perplexity,
        "arms": [
            _arm(arm, title, baseline, ratio)
            for arm, title, ratio in zip(compared, arm_titles(compared), ratios, strict=True)
        ],
    }


def _arm(arm: Arm, title: str, baseline: Arm | None, time_ratio: float | None) -> dict[str, Any]:
    record = arm.first.record
    return {
        "title": title,
        "device": record.device,
        "ranks": record.world_size,
        "precision": record.config.get("train", {}).get("precision"),
        "parameters": record.parameters,
        "flops_per_token": record.flops_per_token,
        "supervision_flops_per_token": record.supervision_flops_per_token,
        "tokens_per_s": arm.tokens_per_s,
        "step_time_ratio": time_ratio,
        "peak_memory_gib": arm.peak_memory_gib,
        "runs": [str(run.folder) for run in arm.runs],
        "curves": {str(seed): [[e["tokens"], e["loss"]] for e in curve] for seed, curve in arm.curves.items()},
        "points": [
            {
                "tokens": e["tokens"],
                "flops": arm.flops(e["tokens"]),
                "loss": e["loss"],
                "low": e.get("loss_low", e["loss"]),
                "high": e.get("loss_high", e["loss"]),
            }
            for e in arm.evaluations
        ],
        "saving": None if baseline is None or arm is baseline else _saving(arm, baseline, time_ratio),
    }


def _saving(arm: Arm, baseline: Arm, time_ratio: float | None) -> dict[str, Any] | None:
    found = arm_saving(arm, baseline)
    if found is None:
        return None
    arithmetic = arithmetic_ratio(found, arm, baseline)
    return dataclasses.asdict(found) | {
        "arithmetic": None if arithmetic is None else found.at_cost(arithmetic),
        "time": None if time_ratio is None else found.at_cost(time_ratio),
    }
