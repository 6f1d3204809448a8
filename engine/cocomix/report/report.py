"""Comparing training runs: a plain-text table for the terminal and one self-contained HTML page."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cocomix.core.config import current_name
from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_write, sweep_leftovers
from cocomix.core.records import is_number
from cocomix.core.tables import text_table
from cocomix.report.arms import Arm, arm_titles, arms
from cocomix.report.figures import FIGURES, draw_figures
from cocomix.report.page import Section, figure_section, folded, html_table, note, page, text_section
from cocomix.report.runs import Run, fixed, load_run, significant, titles
from cocomix.report.token_saving import Saving, arithmetic_ratio, arm_saving

__all__ = ["comparison_table", "load_run", "write_report"]


@dataclass(frozen=True)
class _Comparison:
    heading: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def comparison_table(runs: list[Run]) -> str:
    """Plain-text table of runs at equal training tokens, the largest count at which all have an evaluation.

    Seeds and budgets of one method share a row (see `cocomix.report.arms`): the perplexity is that of their mean loss,
    with the best and the worst seed's. The step time ratio is to the first NTP row on the same devices, per token where
    batch sizes differ. Raises `CocomixError` when the perplexities of the runs don't compare.
    """
    comparison = _compare(runs)
    table = text_table(comparison.header, comparison.rows)
    return "\n".join([comparison.heading, "", table, "", *comparison.notes])


def _compare(runs: list[Run]) -> _Comparison:
    _check_comparable(runs)
    compared = arms(runs)
    tokens = _common_tokens(compared)
    at_tokens = [next(e for e in arm.evaluations if e["tokens"] == tokens) for arm in compared]
    columns = {
        "method": arm_titles(compared),
        "perplexity": significant([_perplexity(evaluation) for evaluation in at_tokens], digits=4),
        **_spread_of_seeds(at_tokens),
        "tokens/s": significant([arm.tokens_per_s for arm in compared], digits=3),
        "step time ratio": fixed(step_time_ratios(compared), decimals=2),
        "peak memory GiB": fixed([arm.peak_memory_gib for arm in compared], decimals=2),
        "parameters": [_abbreviated(arm.first.info["parameters"]) for arm in compared],
    }
    [unigram] = significant([runs[0].info["data"]["val_unigram_perplexity"]], digits=4)
    notes = [f"For orientation: the unigram perplexity of the validation text is {unigram}."]
    notes += _saving_notes(compared, columns["method"])
    notes += _supervision_notes(compared, columns["method"])
    notes += [
        f"{title} has not finished: step {run.last_step:,} of {run.info['total_steps']:,}."
        for title, run in zip(titles(runs), runs, strict=True)
        if not run.summary
    ]
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    return _Comparison(f"Validation perplexity after {tokens:,} training tokens", list(columns), rows, notes)


def _perplexity(evaluation: dict[str, Any]) -> float:
    """As it was logged; of several seeds that of their mean loss."""
    return math.exp(evaluation["loss"]) if "loss_low" in evaluation else evaluation["perplexity"]


def _spread_of_seeds(evaluations: list[dict[str, Any]]) -> dict[str, list[str]]:
    """A column with the best and the worst seed's perplexity, where there are seeds."""
    if not any("loss_low" in evaluation for evaluation in evaluations):
        return {}
    ends = [[math.exp(e[key]) if key in e else None for e in evaluations] for key in ("loss_low", "loss_high")]
    low, high = (significant(values, digits=4) for values in ends)
    return {"of seeds": [f"{a} – {b}" if a != "–" else "–" for a, b in zip(low, high, strict=True)]}


def _saving_notes(compared: list[Arm], names: list[str]) -> list[str]:
    """A sentence for each method beside NTP, and what none of them holds."""
    baseline = next((arm for arm in compared if arm.is_baseline), None)
    if baseline is None:
        return []
    ntp, notes, single = names[compared.index(baseline)], [], False
    for arm, name, time_ratio in zip(compared, names, step_time_ratios(compared), strict=True):
        found = None if arm.is_baseline else arm_saving(arm, baseline)
        if found is not None:
            single |= not found.of_seeds
            notes.append(
                f"{name} reaches a validation loss of {found.loss:.3f} with {_saved(found.share, 'fewer')} tokens than "
                f"{ntp} (a saving {_bounds(found)}).{_at_its_cost(found, arm, baseline, time_ratio)}"
            )
            continue
        if arm.has_budgets != baseline.has_budgets:
            notes.append(f"{name} and {ntp} were not both trained for several budgets: no saving in tokens is told.")
            continue
        best = min(e["loss"] for e in baseline.evaluations)
        if not arm.is_baseline and any(curve[0]["loss"] < best for curve in arm.curves.values()):
            notes.append(
                f"{name} is past the best validation loss of {ntp} ({best:.3f}) at its first evaluation: only earlier "
                "ones, or smaller budgets, would tell how many tokens it saves."
            )
            continue
        lowest, first = min(e["loss"] for e in arm.evaluations), baseline.evaluations[0]["loss"]
        if lowest > first and len(baseline.evaluations) > 1:  # of a single evaluation there is no more to say
            notes.append(
                f"{name} comes to a validation loss of {lowest:.3f}, which {ntp} was past at its first evaluation."
            )
    return [*notes, "What other seeds would give is not in these bounds."] if single else notes


_WHEN = {  # the teacher worked, by where what it gave comes from
    "cached": "once, for a cache, and not in the figures above",
    "online": "while training, in the figures above",
    "cached and online": "a part of it once, for a cache, and not in the figures above, the rest while training",
}


def _supervision_notes(compared: list[Arm], names: list[str]) -> list[str]:
    """What labels and soft targets cost, a sentence for all methods to which they cost the same."""
    baseline = next((arm.first.record.flops_per_token for arm in compared if arm.is_baseline), None)
    alike: dict[tuple[float, str], list[str]] = {}
    for arm, name in zip(compared, names, strict=True):
        record = arm.first.record
        if record.supervision_flops_per_token:
            where = " and ".join(sorted({kind for kind in (record.concept_labels, record.soft_targets) if kind}))
            alike.setdefault((record.supervision_flops_per_token, where), []).append(name)
    notes = []
    for (flops, where), who in alike.items():
        of_ntp = f", {flops / baseline:.2f} times NTP's arithmetic" if baseline else ""
        some = who[0] if len(who) == 1 else f"{len(who)} methods"
        [giga] = significant([flops / 1e9], digits=3)
        notes.append(f"What {some} learned from the teacher took it {giga} GFLOP a token{of_ntp}: {_WHEN[where]}.")
    return notes


def _bounds(found: Saving) -> str:
    by_evaluations = f"between {found.low:.1%} and {found.high:.1%} by the evaluations around it"
    if not found.of_seeds:
        return by_evaluations
    return f"from {min(found.of_seeds):.1%} to {max(found.of_seeds):.1%} by seed, {by_evaluations}"


def _saved(share: float, word: str) -> str:
    """A saving in words; `word` is "fewer" or "less"."""
    return f"{share:.1%} {word}" if share >= 0 else f"{-share:.1%} more"


def _at_its_cost(found: Saving, arm: Arm, baseline: Arm, time_ratio: float | None) -> str:
    """What the saving in tokens is in arithmetic and time, where that is known, and from which one on and whether it
    pays."""
    arithmetic = arithmetic_ratio(found, arm, baseline)
    ratios = {"tokens": 1.0, "arithmetic": arithmetic, "time": time_ratio}
    known = {what: ratio for what, ratio in ratios.items() if ratio is not None}
    costs = [f"{_saved(found.at_cost(ratio), 'less')} {what}" for what, ratio in known.items() if what != "tokens"]
    if not costs:
        return ""
    speeds = " at the speeds measured here" if time_ratio is not None else ""
    text = f" That is {' and '.join(costs)}{speeds}"
    if arithmetic is not None and arithmetic > 1:
        text += f"; in arithmetic it pays from a saving of {1 - 1 / arithmetic:.1%} of the tokens on"
    verdicts = [f"in {what} {_verdict(found, ratio)}" for what, ratio in known.items()]
    return f"{text}. Worth it here: {', '.join(verdicts)}."


def _verdict(found: Saving, ratio: float) -> str:
    """Whether something is saved of which the method needs `ratio` times as much a token, by every seed alike."""
    signs = {1 - (1 - share) * ratio > 0 for share in found.of_seeds or (found.share,)}
    if len(signs) > 1:
        return "not told by these seeds"
    return "yes" if signs == {True} else "no"


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


def _common_tokens(compared: list[Arm]) -> int:
    common = set.intersection(*({evaluation["tokens"] for evaluation in arm.evaluations} for arm in compared))
    if not common:
        runs = [run for arm in compared for run in arm.runs]
        reached = ", ".join(f"{run.folder}: {run.evaluations[-1]['tokens']:,} tokens" for run in runs)
        raise CocomixError(
            f"the runs have no evaluation at equal tokens (last ones: {reached}); wait until the "
            "runs have trained further, or train with the same train.tokens, train.global_batch and train.eval_every"
        )
    return max(common)


def step_time_ratios(compared: list[Arm]) -> list[float | None]:
    """Seconds a token of each arm over those of the first NTP arm on the same devices; None where there is none."""

    def machine(arm):
        return arm.first.info["device"], arm.first.info["world_size"]

    def seconds_per_token(arm):
        return arm.step_time_s / arm.first.info["tokens_per_step"] if arm.step_time_s else None

    ratios = []
    for arm in compared:
        baseline = next((other for other in compared if other.is_baseline and machine(other) == machine(arm)), None)
        reference = seconds_per_token(baseline) if baseline else None
        own = seconds_per_token(arm)
        ratios.append(own / reference if own and reference else None)
    return ratios


def _abbreviated(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return significant([count / size], digits=3)[0] + letter
    return str(count)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"


def write_report(runs: list[Run], out_folder, measured: Sequence[Section] = ()) -> Path:
    """Write `report.html`, which needs nothing beside it, and its figures as PNG files; returns the page's path.

    The page compares `runs` and shows what was `measured` below. Every file appears whole or not at all, the page
    last. Raises `CocomixError` when the runs don't compare and when the folder cannot be written.
    """
    sections = [*(_sections_of(runs) if runs else []), *measured]
    content = page(_title(runs), _subtitle(runs[0]) if runs else "", sections)
    return _write_files(Path(out_folder), content, {name: png for section in sections for name, png in section.figures})


def _title(runs: list[Run]) -> str:
    if not runs:
        return "Measurements"
    return "Report of a training run" if len(runs) == 1 else f"Comparison of {len(runs)} training runs"


def _sections_of(runs: list[Run]) -> list[Section]:
    comparison = _compare(runs)
    table = html_table(comparison.header, comparison.rows)
    return [
        text_section(comparison.heading, table, *map(note, comparison.notes)),
        *(figure_section(*drawn) for drawn in draw_figures(arms(runs))),
        text_section("Runs", html_table(["", *titles(runs)], _facts(runs), "facts")),
        text_section("Settings", *_settings(runs)),
    ]


def _write_files(folder: Path, content: str, figures: dict[str, bytes]) -> Path:
    known = {entry.name for entry in FIGURES}
    for name in ("report.html", *(f"{figure}.png" for figure in known | figures.keys())):
        sweep_leftovers(folder, name)
    try:
        for name in known - figures.keys():
            (folder / f"{name}.png").unlink(missing_ok=True)  # an earlier report's, of other runs
        for name, png in figures.items():
            with atomic_write(folder / f"{name}.png") as file:
                file.write(png)
        with atomic_write(folder / "report.html") as file:
            file.write(content.encode("utf-8", errors="replace"))
    except OSError as error:
        raise CocomixError(f"the report cannot be written: {error}; choose another folder with --out") from None
    return folder / "report.html"


def _subtitle(run: Run) -> str:
    data = run.info["data"]
    return (
        f"{_abbreviated(data['train_tokens'])} training tokens and {_abbreviated(data['val_tokens'])} validation "
        f"tokens, vocabulary {data['vocab_size']:,}, windows of {run.info['seq_len']:,} tokens"
    )


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
        "GFLOP a token, forward and backward": fixed(
            [run.flops_per_token and run.flops_per_token / 1e9 for run in runs], decimals=3
        ),
    }
    if any("label_coverage" in run.evaluations[-1] for run in runs):
        rows |= _concept_facts([run.evaluations[-1] for run in runs])
    rows |= {str(package): [run.info["versions"].get(package, "–") for run in runs] for package in packages}
    return [[name, *(str(value) for value in values)] for name, values in rows.items()]


def _concept_facts(evaluations: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Rows on the concepts at the last evaluation; a dash for runs without."""

    def column(key, form):
        return [form.format(evaluation[key]) if key in evaluation else "–" for evaluation in evaluations]

    return {
        "Training tokens looked at for concepts": column("concept_tokens", "{:,}"),
        "Tokens with a label": column("label_coverage", "{:.1%}"),
        "Labels among the predicted concepts": column("concept_agreement", "{:.1%}"),
        "Different concepts in labels": column("label_concepts", "{:,}"),
        "Different concepts predicted": column("predicted_concepts", "{:,}"),
    }


def _step_times(run: Run) -> tuple[str, str]:
    """Median and "p10 – p90" of a step, in seconds."""
    spread = [(run.summary or {}).get(f"step_time_{percentile}_s") for percentile in ("p10", "p90")]
    known = all(is_number(value) for value in spread)
    median, low, high = significant([run.step_time_s, *(spread if known else (None, None))], digits=3)
    return median, f"{low} – {high}" if known else "–"


def _settings(runs: list[Run]) -> list[Markup]:
    """What differs between the runs as a table, then every run's settings in full, folded."""
    names, settings = titles(runs), [_flattened(run.info["config"]) for run in runs]
    keys = list(dict.fromkeys(key for flat in settings for key in flat))
    differing = [
        [key, *(flat.get(key, "–") for flat in settings)]
        for key in keys
        if key != "train.run" and len({flat.get(key) for flat in settings}) > 1
    ]
    parts = [html_table(["setting", *names], differing, "facts")] if differing else []
    parts += [
        folded(f"All settings of {title}", "\n".join(f"{key}={value}" for key, value in flat.items()))
        for title, flat in zip(names, settings, strict=True)
    ]
    return parts


def _flattened(config: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as {"section.key": text}, by the names that they have now."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict) and value:
            flat |= _flattened(value, f"{prefix}{key}.")
        else:
            flat[current_name(f"{prefix}{key}")] = (
                value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            )
    return flat
