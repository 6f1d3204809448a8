"""A profile's figures as text: one table of the methods, one of the parts of their steps."""

from collections.abc import Iterator

from cocomix.core.tables import aligned
from cocomix.costs.profile_results import MethodResults, ProfileResults, Settings
from cocomix.costs.step_parts import BACKWARD, COMMUNICATION, LABELS, OPTIMIZER, OTHER, TRAINED_PARTS


def describe_profile(found: ProfileResults) -> str:
    """The whole profile, for a terminal."""
    parts = [*_heading(found), "", _methods(found), "", *_competitors(found), ""]
    if any(method.parts for method in found.methods.values()):
        parts += [
            "Where a step goes: ms, and share of it. The heads take their loss's gradient along in the forward pass.",
            "",
            _breakdown(found),
        ]
    return "\n".join(parts).rstrip()


def _heading(found: ProfileResults) -> list[str]:
    machine, settings = found.machine, found.settings
    rates = {settings.precision: found.product_flops_per_s}
    if settings.teacher_precision and found.teacher_product_flops_per_s:
        rates[settings.teacher_precision] = found.teacher_product_flops_per_s
    products = ", ".join(
        f"a large {precision} product runs at {rate.median / 1e12:.3g} TFLOP/s "
        f"({rate.p10 / 1e12:.3g}-{rate.p90 / 1e12:.3g})"
        for precision, rate in rates.items()
    )
    return [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}",
        f"{_parameters(found)}; {', '.join(_how(settings))}",
        f"a step here: {_micro_batches(settings.accumulation)} of {_count(settings.micro_batch, 'window')} of "
        f"{settings.seq_len:,} tokens ({_inputs(settings)}) and an optimizer step",
        f"tokens/s, MFU and ratios: for training, where {_micro_batches(settings.training_accumulation)} share an "
        "optimizer step",
        f"{_count(settings.rounds, 'round')} of {_count(settings.steps, 'step')}; medians, 10th to 90th "
        f"percentile; {products}",
    ]


def _parameters(found: ProfileResults) -> str:
    ntp, mixed = _millions(found.parameters.ntp), _millions(found.parameters.cocomix)
    return f"{ntp} parameters" if mixed == ntp else f"{ntp} parameters, {mixed} with concepts"


def _how(settings: Settings) -> Iterator[str]:
    yield f"mixing {settings.mixing}"
    if "distillation" in settings.method:
        yield " and ".join(["distillation", *settings.learns_from])
    yield settings.precision
    yield f"ZeRO {settings.zero_stage}"
    yield _count(settings.ranks, "rank")
    if settings.compile:
        yield "compile"
    if settings.activation_checkpointing:
        yield "activation checkpointing"
    if settings.attention_backend:
        yield f"attention backend {settings.attention_backend}"


def _millions(number: int) -> str:
    return f"{number / 1e6:,.0f}M" if number >= 1e7 else f"{number / 1e6:.2g}M"


def _inputs(settings: Settings) -> str:
    tokens = "random tokens" if settings.tokens == "random" else "token files"
    if settings.teacher is None:
        return tokens
    teacher = "a teacher of random weights" if settings.teacher == "random" else "the config's teacher"
    return f"{tokens}, {teacher}"


def _micro_batches(number: int) -> str:
    return "1 micro batch" if number == 1 else f"{number:,} micro batches"


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number:,} {what}s"


_HEADER = (
    "",
    "tokens/s",
    "step ms",
    "p10-p90",
    "optimizer",
    "peak GiB",
    "MFU",
    "ratio",
    "p10-p90",
    "ideal",
    "efficiency",
    "break-even saving",
)


def _methods(found: ProfileResults) -> str:
    rows = [_HEADER, *(_method_row(method) for method in found.methods.values())]
    return f"{_table(rows)}\n\n{pays_off(found.paper_saving)}"


def _method_row(method: MethodResults) -> tuple[str, ...]:
    step, ratio = method.step_s, method.ratio
    ratios = ("", "") if ratio is None else (f"{ratio.median:.2f}", f"{ratio.p10:.2f}-{ratio.p90:.2f}")
    if method.efficiency is None:
        against_ideal = ("", "", "")
    else:
        against_ideal = f"{method.ideal_ratio:.2f}", f"{method.efficiency:.2f}", f"{method.break_even_saving:.1%}"
    return (
        method.title,
        f"{method.tokens_per_s:,.0f}",
        f"{step.median * 1e3:,.1f}",
        f"{step.p10 * 1e3:,.1f}-{step.p90 * 1e3:,.1f}",
        f"{method.update_s.median * 1e3:,.1f}",
        f"{method.peak_memory_gib:.2f}",
        f"{method.mfu:.0%}",
        *ratios,
        *against_ideal,
    )


def pays_off(paper_saving: float | None) -> str:
    """What the break-even saving says, and what the paper reports where it does."""
    reported = "" if paper_saving is None else f"; the paper reports {paper_saving:.1%} at 1.38B parameters"
    return f"A run pays off when it saves more tokens than the break-even saving{reported}."


def _competitors(found: ProfileResults) -> Iterator[str]:
    for method in found.methods.values():
        if method.of is None or method.slower is None:
            continue
        ours, slower = found.methods[method.of], method.slower
        memory = ours.peak_memory_gib / method.peak_memory_gib
        smaller = "" if method.windows == ours.windows else f", with {_count(method.windows, 'window')} at a time"
        yield (
            f"{ours.title}: {slower.median:.2f} ({slower.p10:.2f}-{slower.p90:.2f}) times the "
            f"tokens/s of {method.title}{smaller}; {memory:.2f} times its peak memory"
        )


_PART_ROWS = (
    LABELS,
    *(name for part in TRAINED_PARTS for name in (part, part + BACKWARD)),
    OPTIMIZER,
    COMMUNICATION,
    OTHER,
)


def _breakdown(found: ProfileResults) -> str:
    """Two columns a method: milliseconds of each part and its share of the step."""
    measured = {name: method for name, method in found.methods.items() if method.parts}
    rows = [("", *(cell for name, method in measured.items() for cell in (_short_title(name, method), "")))]
    for part in _PART_ROWS:
        cells = [cell for method in measured.values() for cell in _part_cells(method, part)]
        if any(cells):
            rows.append((part, *cells))
    rows.append(("together; of the step above", *(cell for method in measured.values() for cell in _whole(method))))
    return _table(rows)


def _short_title(name: str, method: MethodResults) -> str:
    return method.title if name == "alone" else name


def _part_cells(method: MethodResults, part: str) -> tuple[str, str]:
    assert method.parts is not None and method.parts_s is not None
    seconds = method.parts[part]
    return (f"{seconds * 1e3:,.1f}", f"{seconds / method.parts_s:.1%}") if seconds else ("", "")


def _whole(method: MethodResults) -> tuple[str, str]:
    assert method.parts_s is not None and method.parts_over_step is not None
    return f"{method.parts_s * 1e3:,.1f}", f"{method.parts_over_step.median:.1%}"


def _table(rows: list[tuple[str, ...]]) -> str:
    return "\n".join(line.rstrip() for line in aligned(rows))
