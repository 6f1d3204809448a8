"""A profile's figures as text: one table of the methods, one of the parts of their steps."""

from cocomix.core.tables import aligned
from cocomix.costs.step_parts import BACKWARD, COMMUNICATION, LABELS, OPTIMIZER, OTHER, TRAINED_PARTS


def describe_profile(found: dict) -> str:
    """Everything that `cocomix.costs.profiler.results` found, for a terminal."""
    parts = [*_heading(found), "", _methods(found), "", *_competitors(found)]
    if any(method["parts"] for method in found["methods"].values()):
        parts += [
            "Where a step goes: ms, and share of it. The heads take their loss's gradient along in the forward pass.",
            "",
            _breakdown(found),
        ]
    return "\n".join(parts).rstrip()


def _heading(found):
    machine, settings, rate = found["machine"], found["settings"], found["product_flops_per_s"]
    ntp, mixed = (_millions(found["parameters"][name]) for name in ("ntp", "cocomix"))
    distils = [" and ".join(["distillation", *settings["learns_from"]])] if "distillation" in settings["method"] else []
    how = [
        f"mixing {settings['mixing']}",
        *distils,
        settings["precision"],
        f"ZeRO {settings['zero_stage']}",
        _count(settings["ranks"], "rank"),
    ]
    how += [name.replace("_", " ") for name in ("compile", "activation_checkpointing") if settings[name]]
    if settings["attention_backend"]:
        how.append(f"attention backend {settings['attention_backend']}")
    return [
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}, commit {machine['commit']}",
        f"{ntp} parameters{f', {mixed} with concepts' * (mixed != ntp)}; {', '.join(how)}",
        f"a step here: {_micro_batches(settings['accumulation'])} of {_count(settings['micro_batch'], 'window')} of "
        f"{settings['seq_len']:,} tokens ({_tokens(settings)}) and an optimizer step",
        f"tokens/s, MFU and ratios: for training, where {_micro_batches(settings['training_accumulation'])} share an "
        "optimizer step",
        f"{_count(settings['rounds'], 'round')} of {_count(settings['steps'], 'step')}; medians, 10th to 90th "
        f"percentile; a large {settings['precision']} product runs at {rate['median'] / 1e12:.3g} TFLOP/s "
        f"({rate['p10'] / 1e12:.3g}-{rate['p90'] / 1e12:.3g})",
    ]


def _millions(number):
    return f"{number / 1e6:,.0f}M" if number >= 1e7 else f"{number / 1e6:.2g}M"


def _tokens(settings):
    tokens = "random tokens" if settings["tokens"] == "random" else "token files"
    teacher = {None: "", "random": ", a teacher of random weights", "config": ", the config's teacher"}
    return tokens + teacher[settings["teacher"]]


def _micro_batches(number):
    return f"{number:,} micro batch{'es' * (number != 1)}"


def _count(number, what):
    return f"{number:,} {what}{'s' * (number != 1)}"


def _methods(found):
    rows = [
        (
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
    ]
    for method in found["methods"].values():
        step, ratio = method["step_s"], method["ratio"]
        cells = ["", "", "", "", ""]
        if ratio is not None:
            cells[:2] = f"{ratio['median']:.2f}", f"{ratio['p10']:.2f}-{ratio['p90']:.2f}"
        if method["efficiency"] is not None:
            cells[2:] = (
                f"{method['ideal_ratio']:.2f}",
                f"{method['efficiency']:.2f}",
                f"{method['break_even_saving']:.1%}",
            )
        rows.append(
            (
                method["title"],
                f"{method['tokens_per_s']:,.0f}",
                f"{step['median'] * 1e3:,.1f}",
                f"{step['p10'] * 1e3:,.1f}-{step['p90'] * 1e3:,.1f}",
                f"{method['update_s']['median'] * 1e3:,.1f}",
                f"{method['peak_memory_gib']:.2f}",
                f"{method['mfu']:.0%}",
                *cells,
            )
        )
    return f"{_table(rows)}\n\n{pays_off(found['paper_saving'])}"


def pays_off(paper_saving: float | None) -> str:
    """What the break-even saving says, and what the paper reports where it does."""
    reported = "" if paper_saving is None else f"; the paper reports {paper_saving:.1%} at 1.38B parameters"
    return f"A run pays off when it saves more tokens than the break-even saving{reported}."


def _competitors(found):
    for method in found["methods"].values():
        if method["of"] is None:
            continue
        ours, slower = found["methods"][method["of"]], method["slower"]
        memory = ours["peak_memory_gib"] / method["peak_memory_gib"]
        smaller = (
            "" if method["windows"] == ours["windows"] else f", with {_count(method['windows'], 'window')} at a time"
        )
        yield (
            f"{ours['title']}: {slower['median']:.2f} ({slower['p10']:.2f}-{slower['p90']:.2f}) times the "
            f"tokens/s of {method['title']}{smaller}; {memory:.2f} times its peak memory"
        )
    yield ""


def _breakdown(found):
    methods = {name: method for name, method in found["methods"].items() if method["parts"]}
    names = [
        LABELS,
        *(name for part in TRAINED_PARTS for name in (part, part + BACKWARD)),
        OPTIMIZER,
        COMMUNICATION,
        OTHER,
    ]
    rows = [
        ("", *(cell for name, method in methods.items() for cell in (method["title"] if name == "alone" else name, "")))
    ]
    for part in names:
        if any(method["parts"][part] for method in methods.values()):
            rows.append((part, *(cell for method in methods.values() for cell in _share(method, part))))
    sums = (
        (f"{method['parts_s'] * 1e3:,.1f}", f"{method['parts_over_step']['median']:.1%}") for method in methods.values()
    )
    rows.append(("together; of the step above", *(cell for pair in sums for cell in pair)))
    return _table(rows)


def _share(method, part):
    seconds = method["parts"][part]
    return (f"{seconds * 1e3:,.1f}", f"{seconds / method['parts_s']:.1%}") if seconds else ("", "")


def _table(rows):
    return "\n".join(line.rstrip() for line in aligned(rows))
