"""What was measured, for the report: profiles and benchmarks as tables and figures."""

from pathlib import Path
from typing import Any

from cocomix.core.errors import CocomixError
from cocomix.costs.profile_results import MethodResults, ProfileResults
from cocomix.costs.profile_text import pays_off
from cocomix.report import measurement_figures
from cocomix.report.figures import FigureEntry, draw
from cocomix.report.measurements import Benchmarks, Change, compare, load_benchmarks
from cocomix.report.page import Section, figure_section, html_table, note, text_section
from cocomix.report.runs import fixed


def measured_sections(profiles: list[str], bench: str | None, before: str | None) -> tuple[list[Section], str]:
    """The sections of the files that are named, and what is to be said about the comparison of two benchmark files.

    Raises `CocomixError` for a file of another kind, and for an older file without a newer one.
    """
    if before and not bench:
        raise CocomixError("--bench-before is compared with --bench: name the newer file too")
    sections = [
        section
        for number, path in enumerate(profiles, start=1)
        for section in profile_sections(ProfileResults.read(path), number, Path(path).name)
    ]
    if not bench:
        return sections, ""
    new, old = load_benchmarks(bench), load_benchmarks(before) if before else None
    return sections + benchmark_sections(new, old), comparison_text(compare(old, new)) if old else ""


def profile_sections(profile: ProfileResults, number: int, name: str) -> list[Section]:
    """A table of the methods of a profile and a bar of where their steps go; `name` is its file's."""
    settings = profile.settings
    header = ["method", "tokens/s", "step ms", "peak GiB", "MFU", "ratio", "ideal", "efficiency", "break-even saving"]
    rows = [
        [
            method.title,
            f"{method.tokens_per_s:,.0f}",
            f"{1e3 * method.step_s.median:,.1f}",
            f"{method.peak_memory_gib:.3g}",
            f"{method.mfu:.0%}",
            *_ratios(method),
        ]
        for method in profile.methods.values()
    ]
    words = (
        f"{profile.machine.get('device', '')}; {settings.precision}, ZeRO {settings.zero_stage}, ranks: "
        f"{settings.ranks}, micro batches of {settings.micro_batch} x {settings.seq_len:,} tokens, {settings.rounds} "
        f"rounds; commit {profile.machine.get('commit')}. {pays_off(profile.paper_saving)}"
    )
    table = text_section(f"What a step costs: {name}", html_table(header, rows), note(words))
    drawn = draw(
        FigureEntry(
            f"step_parts_{number}",
            f"Where a step goes: {name}",
            "Share of a step; at its end its length. Backward passes are paler than forward passes.",
            measurement_figures.step_parts,
        ),
        profile,
    )
    return [table, *([figure_section(*drawn)] if drawn else [])]


def _ratios(method: MethodResults) -> list[str]:
    ratio = None if method.ratio is None else method.ratio.median
    saving = method.break_even_saving
    return [
        *(fixed([value], 2)[0] for value in (ratio, method.ideal_ratio, method.efficiency)),
        "–" if saving is None else f"{saving:.1%}",
    ]


def benchmark_sections(new: Benchmarks, old: Benchmarks | None = None) -> list[Section]:
    """Each operation against its floor, sweeps where there are any, and the comparison with an older run."""
    machine = ", ".join(f"{key} {value}" for key, value in new.machine.items() if value is not None)
    sections = [text_section("Benchmarks", note(machine))]
    for operation in dict.fromkeys(row["operation"] for row in new.rows):
        rows = [row for row in new.rows if row["operation"] == operation]
        entry = FigureEntry(f"bench_{operation}", operation, _floor_of(rows), measurement_figures.against_floor)
        sections += _drawn(entry, rows)
    for key, groups in measurement_figures.sweeps(new.rows).items():
        entry = FigureEntry(
            f"sweep_{key}",
            f"Time over {key}",
            "Median; the band is the 10th to 90th percentile.",
            measurement_figures.sweep,
        )
        sections += _drawn(entry, key, groups)
    if old is not None:
        sections.append(_comparison(compare(old, new)))
    return sections


def _floor_of(rows: list[dict[str, Any]]) -> str:
    formulas = sorted({row["floor_formula"] for row in rows if row.get("floor_formula")})
    return f"Floor: {'; '.join(formulas)}. Median, with the 10th to 90th percentile of the rounds."


def _drawn(entry: FigureEntry, *arguments) -> list[Section]:
    drawn = draw(entry, *arguments)
    return [] if drawn is None else [figure_section(*drawn)]


def _comparison(changes: list[Change]) -> Section:
    header = ["benchmark", "contestant", "before", "now", "now / before", ""]
    rows = [
        [
            change.title,
            change.contestant,
            f"{change.old['median']:.3g} {change.unit}",
            f"{change.new['median']:.3g} {change.unit}",
            f"{change.ratio:.2f}",
            "" if change.verdict == "same" else change.verdict,
        ]
        for change in changes
    ]
    return text_section("Compared with the older run", html_table(header, rows))


def comparison_text(changes: list[Change]) -> str:
    """The benchmarks that became slower or faster beyond the noise that both runs show, a line each."""
    lines = [
        f"{change.verdict}: {change.title} {change.contestant}: {change.old['median']:.3g} -> "
        f"{change.new['median']:.3g} {change.unit} (x {change.ratio:.2f})"
        for change in changes
        if change.verdict != "same"
    ]
    slower = sum(change.verdict == "slower" for change in changes)
    summary = f"{len(changes)} benchmarks compared: {slower} slower, {len(lines) - slower} faster beyond the noise"
    return "\n".join([*lines, summary])
