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

What it finds, and writes with `--json`, is a `cocomix.costs.profile_results.ProfileResults`.
"""

import dataclasses

import numpy as np

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.files import write_own_json
from cocomix.core.flops import parameter_count
from cocomix.core.machine import describe
from cocomix.core.methods import SOFT_TARGETS, method_title
from cocomix.core.precision import STUDENT, TEACHER, settled
from cocomix.core.shapes import StudentShape
from cocomix.costs.profile_inputs import RandomTokens
from cocomix.costs.profile_results import MethodResults, Parameters, ProfileResults, Settings, Spread
from cocomix.costs.profile_session import NTP, Method, Options, OutOfMemory, Profile
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
        config, notes = settled(config, ranks.device.type)
        profile = fitting_profile(config, options, ranks)
        if ranks.is_first and STUDENT in notes:
            print(notes[STUDENT])
        if ranks.is_first and TEACHER in notes and profile.teachers:
            print(notes[TEACHER])
        try:
            profile.measure()
            found = results(profile)
            files = [] if trace is None else profile.trace(trace)
        finally:
            profile.close()
        if not ranks.is_first:
            return
        if json_file is not None:
            write_own_json(json_file, found.as_json())
        print(describe_profile(found))
        for file in files:
            print(f"trace: {file}")
        if json_file is not None:
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


def results(profile: Profile) -> ProfileResults:
    """What was measured."""
    shape, config = profile.shape, profile.config
    of_teacher = Spread.of(profile.rates[config.teacher.dtype]) if profile.teachers else None
    return ProfileResults(
        machine=describe(profile.ranks.device),
        settings=_settings(profile),
        student=shape,
        teacher=teacher_shape(profile.teachers),
        parameters=Parameters(
            ntp=parameter_count(dataclasses.replace(shape, mixing="none")), cocomix=parameter_count(shape)
        ),
        product_flops_per_s=Spread.of(profile.rates[config.train.precision]),
        teacher_product_flops_per_s=of_teacher,
        paper_saving=PAPER_SAVING if is_papers_form(shape) else None,
        methods={method.name: _figures(profile, method) for method in profile.methods.values()},
    )


def is_papers_form(shape: StudentShape) -> bool:
    """Whether the student is the paper's, of which it says what it saves."""
    return shape.mixing == "interleave" and not shape.concept_residual and shape.concept_every == 1


def _settings(profile: Profile) -> Settings:
    config, options, train = profile.config, profile.options, profile.config.train
    shape, teacher = profile.shape, "random" if options.random_teacher else "config"
    distils = SOFT_TARGETS in learns_from(config)
    return Settings(
        precision=train.precision,
        zero_stage=train.zero_stage,
        micro_batch=train.micro_batch,
        compile=train.compile,
        activation_checkpointing=train.activation_checkpointing,
        attention_backend=train.attention_backend,
        accumulation=options.accumulation,
        training_accumulation=profile.training_accumulation,
        ranks=profile.ranks.world,
        seq_len=shape.seq_len,
        mixing=shape.mixing,
        method=method_title(shape.mixing, distils, shape.concept_residual, shape.concept_every),
        learns_from=[kind.title(config) for kind in wanted_kinds(config)],
        tokens="random" if isinstance(profile.split, RandomTokens) else "files",
        teacher=teacher if profile.teachers else None,
        teacher_precision=config.teacher.dtype if profile.teachers else None,
        rounds=profile.rounds,
        steps=profile.steps,
    )


def _figures(profile: Profile, method: Method) -> MethodResults:
    own = _training_seconds(profile, method)
    median = float(np.median(own))
    ratio = None if method.name == NTP else Spread.of(own / _training_seconds(profile, profile.methods[NTP]))
    mixed_ratio = None if method.of == NTP else ratio  # a competitor of NTP mixes nothing
    floor = _floor_seconds(profile, method)
    ideal = mixed_ratio and floor / _floor_seconds(profile, profile.methods[NTP])
    marked = _marked_steps(method)
    return MethodResults(
        title=method.title,
        of=method.of,
        windows=method.windows,
        step_s=Spread.of(method.seconds),
        update_s=Spread.of(method.update_seconds),
        tokens_per_s=profile.ranks.world / median,
        peak_memory_gib=method.peak_bytes / 2**30,
        flops_per_token=method.flops_per_token,
        mfu=floor / median,
        ratio=ratio,
        ideal_ratio=ideal,
        efficiency=mixed_ratio and ideal and ideal / mixed_ratio.median,
        break_even_saving=mixed_ratio and 1 - 1 / mixed_ratio.median,
        slower=None if method.of is None else Spread.of(own / _training_seconds(profile, profile.methods[method.of])),
        parts=None if marked is None else _breakdown(marked),
        parts_s=None if marked is None else float(np.median(marked.sum(1))),
        parts_over_step=None if marked is None else Spread.of(marked.sum(1) / np.array(method.seconds)),
    )


def _floor_seconds(profile: Profile, method: Method) -> float:
    """Seconds per token that the method's arithmetic takes at the product rates of the student's and the teacher's
    precision."""
    config, teachers_part = profile.config, method.teacher_flops_per_token
    own = (method.flops_per_token - teachers_part) / float(np.median(profile.rates[config.train.precision]))
    return own + (teachers_part / float(np.median(profile.rates[config.teacher.dtype])) if teachers_part else 0.0)


def _training_seconds(profile: Profile, method: Method) -> np.ndarray:
    """Seconds per token of one rank in training, by round: micro batches as measured, and an optimizer step for as
    many of them as share one there."""
    windows = profile.config.train.micro_batch * profile.training_accumulation
    step, update = np.array(method.seconds), np.array(method.update_seconds)
    in_training = (step - update) * windows / (method.windows * profile.options.accumulation) + update
    return in_training / (windows * profile.shape.seq_len)


def _marked_steps(method: Method) -> np.ndarray | None:
    """Seconds of a marked step by round and part, or None where none was taken."""
    return np.array([[parts[name] for name in PARTS] for parts in method.parts]) if method.parts else None


def _breakdown(marked: np.ndarray) -> dict[str, float]:
    """Shares of the step, averaged over rounds, of the median marked step: so the parts still add up to it."""
    steps = marked.sum(1)
    parts = (marked / steps[:, None]).mean(0) * np.median(steps)
    return dict(zip(PARTS, parts.tolist(), strict=True))
