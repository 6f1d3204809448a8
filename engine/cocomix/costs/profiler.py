"""`cocomix profile`: what continuous concepts cost against next-token prediction, measured on this machine.

Every *method* trains the same shape on the same tokens with the same settings, by the step and the engine of
`cocomix train`: "ntp", and the config's method with "cached" and with "online" labels (or soft targets, which a
distilled student learns from); "alone" where it needs neither. Both kinds of labels share one engine, so two students
are in memory at a time. Rounds take turns among the methods, so a machine that drifts hits all of them.
A round times a method's steps as they are in training and then, apart from that, the same steps with marks that say
where the time goes (`cocomix.costs.step_parts`).

A step has one micro batch (or `--accumulation`) and an optimizer step. In training more micro batches may share an
optimizer step: train.global_batch says how many. So tokens/s, MFU and ratios are those of a training step that is put
together from the two measured times; where gradients are averaged after every micro batch (ZeRO stages 2 and 3 on
several ranks), measure with the accumulation of training.

The JSON file (`--json`) holds one object:

    kind         "profile"
    machine      device, versions and commit (`cocomix.core.machine.describe`)
    settings     what was run: precision, zero_stage, ranks, micro_batch (windows of one rank), accumulation, seq_len,
                 compile, activation_checkpointing, attention_backend, mixing, method (for people), learns_from (for
                 people), tokens ("files" | "random"), teacher ("config" | "random" | null),
                 rounds, steps (of a round), training_accumulation (micro batches of a rank that share an optimizer
                 step in training)
    student      the student's shape, teacher its teacher's or null; parameters {"ntp", "cocomix"} (of the method)
    product_flops_per_s   {median, p10, p90} of a large square product in the training precision
    paper_saving 0.215: the share of training tokens that the paper reports saved at 1.38B by CoCoMix; null for others
    methods      by name: "ntp", "cached", "online", "alone", and those of `--against`, each
        title        for people
        of           the method that it competes with, null for ours
        windows      windows of one rank in a micro batch
        step_s       {median, p10, p90} over rounds: `accumulation` micro batches and an optimizer step
        update_s     the same of that optimizer step alone
        tokens_per_s in training, over all ranks
        peak_memory_gib       tensors alive at once on one rank: weights, optimizer, activations, and the teacher
        flops_per_token, mfu  what the method needs, and that over time and the product's rate; of one rank
        ratio        {median, p10, p90} of its time per token over NTP's in the same round; null for "ntp"
        ideal_ratio, efficiency, break_even_saving   null for "ntp" and for a competitor of it
        slower       {median, p10, p90} of a competitor's time per token over that of the method it competes with
        parts        seconds of a step by part, in the order of `step_parts.PARTS`, or null; they add up to parts_s
        parts_s      the step with marks, and parts_over_step {median, p10, p90} of it over the step without, by round
"""

import dataclasses

import numpy as np

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.files import write_json
from cocomix.core.flops import parameter_count
from cocomix.core.machine import describe
from cocomix.core.methods import SOFT_TARGETS, method_title
from cocomix.costs.profile_inputs import RandomTokens
from cocomix.costs.profile_session import NTP, Options, OutOfMemory, Profile
from cocomix.costs.profile_text import describe_profile
from cocomix.costs.step_parts import PARTS
from cocomix.distributed.ranks import process_group
from cocomix.teacher.supervision import learns_from, teacher_shape, wanted_kinds

PAPER_SAVING = 0.215  # CoCoMix (arXiv 2502.08524), abstract: 1.38B parameters, 200B tokens


def run(config: Config, options: Options, trace=None, json_file=None) -> None:
    """`cocomix profile`: measure, print the tables, and write the traces and the JSON file where they are wanted.

    Raises `CocomixError` for settings that cannot be run, among them those that do not fit into memory.
    """
    with process_group(config.train.timeout_minutes) as ranks:
        profile = fitting_profile(config, options, ranks)
        try:
            profile.measure()
            found = results(profile)
            files = [] if trace is None else profile.trace(trace)
        finally:
            profile.close()
        if not ranks.is_first:
            return
        print(describe_profile(found))
        for file in files:
            print(f"trace: {file}")
        if json_file is not None:
            write_json(json_file, found)
            print(f"figures: {json_file}")


def fitting_profile(config: Config, options: Options, ranks) -> Profile:
    """The profile; with `options.fit` at the largest halving of the micro batch at which every method of ours fits, and
    competitors with smaller ones where they need more memory. Raises `CocomixError` where it does not fit."""
    windows = {}
    while True:
        try:
            return Profile(config, options, ranks, windows)
        except OutOfMemory as error:
            name, is_ours = error.name, error.is_ours
        size = windows.get(name, config.train.micro_batch)
        if not options.fit or ranks.world > 1 or size == 1:
            raise CocomixError(
                f"{name} does not fit into memory with micro batches of {size} windows: lower "
                "train.micro_batch, or pass --fit (one process)"
            )
        if is_ours:
            train = dataclasses.replace(config.train, micro_batch=size // 2)
            config, windows = dataclasses.replace(config, train=train), {}
        else:
            windows[name] = size // 2


def results(profile: Profile) -> dict:
    """What was measured, as the module's docstring describes it."""
    ranks, shape, options, train = profile.ranks, profile.shape, profile.options, profile.config.train
    of_teachers, config = teacher_shape(profile.teachers), profile.config
    teacher = None if of_teachers is None else dataclasses.asdict(of_teachers)
    rates = np.array(profile.rates)
    return {
        "kind": "profile",
        "machine": describe(ranks.device),
        "settings": {
            **{
                name: getattr(train, name)
                for name in (
                    "precision",
                    "zero_stage",
                    "micro_batch",
                    "compile",
                    "activation_checkpointing",
                    "attention_backend",
                )
            },
            "accumulation": options.accumulation,
            "training_accumulation": profile.training_accumulation,
            "ranks": ranks.world,
            "seq_len": shape.seq_len,
            "mixing": shape.mixing,
            "method": method_title(shape.mixing, SOFT_TARGETS in learns_from(config)),
            "learns_from": [kind.title(config) for kind in wanted_kinds(config)],
            "tokens": "random" if isinstance(profile.split, RandomTokens) else "files",
            "teacher": None if teacher is None else "random" if options.random_teacher else "config",
            "rounds": profile.rounds,
            "steps": profile.steps,
        },
        "student": dataclasses.asdict(shape),
        "teacher": teacher,
        "parameters": {
            "ntp": parameter_count(dataclasses.replace(shape, mixing="none")),
            "cocomix": parameter_count(shape),
        },
        "product_flops_per_s": spread(rates),
        "paper_saving": PAPER_SAVING if shape.mixing == "interleave" else None,
        "methods": {method.name: _figures(profile, method) | _breakdown(method) for method in profile.methods.values()},
    }


def _figures(profile, method):
    own = _training_seconds(profile, method)
    ratio = None if method.name == NTP else spread(own / _training_seconds(profile, profile.methods[NTP]))
    is_mixed = NTP not in (method.name, method.of)
    median = float(np.median(own))
    return {
        "title": method.title,
        "of": method.of,
        "windows": method.windows,
        "step_s": spread(method.seconds),
        "update_s": spread(method.update_seconds),
        "tokens_per_s": profile.ranks.world / median,
        "peak_memory_gib": method.peak_bytes / 2**30,
        "flops_per_token": method.flops_per_token,
        "mfu": method.flops_per_token / median / float(np.median(profile.rates)),
        "ratio": ratio,
        "ideal_ratio": method.ideal_ratio if is_mixed else None,
        "efficiency": method.ideal_ratio / ratio["median"] if is_mixed else None,  # pyright: ignore[reportOptionalSubscript]  there is one where is_mixed
        "break_even_saving": 1 - 1 / ratio["median"] if is_mixed else None,  # pyright: ignore[reportOptionalSubscript]  there is one where is_mixed
        "slower": None if method.of is None else spread(own / _training_seconds(profile, profile.methods[method.of])),
    }


def _training_seconds(profile, method):
    """Seconds per token of one rank in training, by round: micro batches as measured, and an optimizer step for as
    many of them as share one there."""
    windows = profile.config.train.micro_batch * profile.training_accumulation
    step, update = np.array(method.seconds), np.array(method.update_seconds)
    in_training = (step - update) * windows / (method.windows * profile.options.accumulation) + update
    return in_training / (windows * profile.shape.seq_len)


def _breakdown(method):
    """Shares of the step, averaged over rounds, of the median marked step: so the parts still add up to it."""
    if not method.parts:
        return {"parts": None, "parts_s": None, "parts_over_step": None}
    rounds = np.array([[parts[name] for name in PARTS] for parts in method.parts])
    steps = rounds.sum(1)
    parts = (rounds / steps[:, None]).mean(0) * np.median(steps)
    return {
        "parts": dict(zip(PARTS, parts.tolist(), strict=True)),
        "parts_s": float(np.median(steps)),
        "parts_over_step": spread(steps / np.array(method.seconds)),
    }


def spread(values) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(np.asarray(values), [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}
