"""The methods of a profile: students, teacher and competitors in memory together, and the rounds that measure them."""

import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.flops import training_flops
from cocomix.core.machine import ProductRate, give_memory_back, is_out_of_memory, kept_bytes, peak_bytes, synchronize
from cocomix.core.methods import CONCEPT_LABELS, SOFT_TARGETS, method_title, mixes_concepts
from cocomix.core.shapes import student_shape
from cocomix.costs.profile_inputs import baseline, build_teachers, open_tokens, random_caches
from cocomix.costs.step_parts import OPTIMIZER, Timeline, marked, marked_updates
from cocomix.distributed.ranks import Ranks
from cocomix.teacher.language_model import DTYPES
from cocomix.teacher.supervision import Supervision, learns_from, teacher_shape, wanted_kinds
from cocomix.training.deepspeed_engine import build_engine
from cocomix.training.train_step import TrainStep, build_student, training_batches

NTP, CACHED, ONLINE = "ntp", "cached", "online"  # the baseline, and the student by where its labels come from
ALONE = "alone"  # a student that needs nothing but tokens
PUBLIC, TRANSFORMERS = "public", "transformers"  # what --against takes
_ENDLESS = 10**15  # training tokens: a profile ends when its rounds do
_WARM_UP = {"cpu": 0, "cuda": 3}  # further steps, after the first and the one whose memory is taken
_TRACED_STEPS = 2
DEFAULT_ROUNDS, DEFAULT_STEPS = {"cpu": 5, "cuda": 10}, {"cpu": 1, "cuda": 5}


class Peers(Protocol):
    """The competitors, which benchmarks/peers.py implements: each of the first two makes a context in which a model of
    ours computes as the competitor does."""

    def public_student(self, model: nn.Module) -> Callable: ...

    def transformers_gpt2(self, model: nn.Module, compiled: bool) -> Callable: ...

    def PublicTeacher(self, teacher: Any) -> Any: ...


@dataclass(frozen=True)
class Options:
    """What is measured, beside the config."""

    labels: tuple[str, ...] | None = None  # of CACHED and ONLINE; None: both where there is a teacher
    against: tuple[str, ...] = ()  # of PUBLIC and TRANSFORMERS, which `peers` knows
    peers: "Peers | None" = None  # those that `against` names
    rounds: int | None = None  # None: by device
    steps: int | None = None  # of a method in a round; None: by device
    accumulation: int = 1  # micro batches in a step
    fit: bool = False  # halve the micro batch until it fits
    random_teacher: bool = False
    vocab_size: int | None = None
    breakdown: bool = True


@dataclass
class Student:
    """An engine and what it keeps in memory after its first step, bytes."""

    engine: Any
    kept_bytes: int = 0


@dataclass
class Method:
    """One way to train, ready to step; what was measured of it."""

    name: str
    title: str  # for people
    student: Student
    train_step: TrainStep
    batches: Iterator[dict]
    windows: int  # in a micro batch of one rank
    flops_per_token: int
    teacher_flops_per_token: int  # of them, those of the teacher's work
    of: str | None = None  # the method that it competes with
    way: Callable = contextlib.nullcontext  # inside this context the engine computes as a competitor does
    has_parts: bool = True
    seconds: list[float] = field(default_factory=list)  # of a step, by round
    update_seconds: list[float] = field(default_factory=list)  # of them, those of the optimizer, by round
    parts: list[dict] = field(default_factory=list)  # seconds of a step by part, by round
    peak_bytes: int = 0

    def step(self) -> None:
        """One optimizer step."""
        with self.way():
            self.train_step(self.batches)


class Profile:
    """Students, teacher and methods of one profile. Building it takes every method's first step and its peak memory.

    `windows` maps a competitor's name to the windows of its micro batches, where those of the config do not fit it.
    Raises `OutOfMemory` where a method does not fit.
    """

    def __init__(self, config: Config, options: Options, ranks: Ranks, windows: dict[str, int] | None = None):
        if config.model.mixing == "none" and not learns_from(config):
            raise CocomixError(
                "model.mixing is none and distillation.weight is 0, which leaves nothing to compare: "
                "pass --mixing interleave, or set distillation.weight"
            )
        self.config, self.options, self.ranks = _endless(config, options, ranks.world), options, ranks
        self.training_accumulation = max(1, config.train.global_batch // (config.train.micro_batch * ranks.world))
        self.rounds = options.rounds or DEFAULT_ROUNDS[ranks.device.type]
        self.steps = options.steps or DEFAULT_STEPS[ranks.device.type]
        self.split, self.vocab_size = open_tokens(config, options.vocab_size)
        self.shape = student_shape(self.config, self.vocab_size)
        self.kinds = self._kinds()
        _check_against(options, config)
        self.teachers, self.teacher_bytes, self.methods = {}, 0, {}
        dtypes = {config.train.precision, *([config.teacher.dtype] if ONLINE in self.kinds else [])}
        # now: later nothing may be free
        self._products = {dtype: ProductRate(ranks.device, DTYPES[dtype]) for dtype in sorted(dtypes)}
        self.rates: dict[str, list[float]] = {dtype: [] for dtype in self._products}
        self._windows = windows or {}
        gc.collect()
        gc.freeze()  # what is there now need not be looked through each time that memory is counted
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        finally:
            gc.unfreeze()

    def _kinds(self):
        config, wanted = self.config, learns_from(self.config)
        if not wanted:
            if self.options.labels:
                raise CocomixError(
                    f"the method ({method_title(config.model.mixing)}) learns from no teacher: leave out --labels"
                )
            return (ALONE,)
        of_labels = CONCEPT_LABELS not in wanted or config.teacher.sae
        has_teacher = self.options.random_teacher or bool(config.teacher.model and of_labels)
        is_possible = {CACHED: SOFT_TARGETS not in wanted or config.distillation.top_k, ONLINE: has_teacher}
        kinds = self.options.labels or tuple(kind for kind in (CACHED, ONLINE) if is_possible[kind])
        if not kinds or (ONLINE in kinds and not has_teacher):
            raise CocomixError(
                f"online {wanted[0]} need a teacher: set teacher.model"
                f"{' and teacher.sae' if CONCEPT_LABELS in wanted else ''}, or "
                f"pass --random-teacher{', or profile --labels cached alone' if is_possible[CACHED] else ''}"
            )
        return kinds

    # Building

    def _build(self):
        device = self.ranks.device
        if ONLINE in self.kinds:
            self.teacher_bytes, self.teachers = kept_bytes(
                lambda: build_teachers(self.config, device, self.vocab_size, self.options.random_teacher), device
            )
        ntp = self._student(NTP, baseline(self.config))
        self._add(NTP, method_title("none"), ntp, NTP)
        mixed = self._student(self.kinds[0], self.config)
        for kind in self.kinds:
            self._add(kind, self._title(kind), mixed, kind)
        if self.options.peers is not None:
            self._add_competitors(self.options.peers, ntp, mixed)
        for method in self.methods.values():
            self._first_steps(method)

    def _add_competitors(self, peers, ntp, mixed):
        if TRANSFORMERS in self.options.against:
            way = peers.transformers_gpt2(ntp.engine.module, self.config.train.compile)
            self._add(TRANSFORMERS, "transformers GPT-2", ntp, NTP, of=NTP, way=way, has_parts=False)
        if PUBLIC in self.options.against:
            for kind in self.kinds:
                teachers = None
                if kind == ONLINE:
                    teachers = {CONCEPT_LABELS: peers.PublicTeacher(self.teachers[CONCEPT_LABELS])}
                self._add(
                    f"{PUBLIC} {kind}",
                    f"public way, {kind} labels",
                    mixed,
                    kind,
                    of=kind,
                    way=peers.public_student(mixed.engine.module),
                    teachers=teachers,
                )

    def _title(self, kind):
        sources = " and ".join(kind.title(self.config) for kind in wanted_kinds(self.config))
        model = self.config.model
        method = method_title(
            model.mixing, SOFT_TARGETS in learns_from(self.config), model.concept_residual, model.concept_every
        )
        return method if kind == ALONE else f"{method}, {kind} {sources}"

    def _student(self, name, config):
        def build():
            with torch.device(self.ranks.device):
                model = build_student(config, self.vocab_size)
            return Student(build_engine(model, config, self.ranks.device, self.ranks.world))

        kept, student = self._fitting(name, kept_bytes, build)
        student.kept_bytes = kept
        return student

    def _add(self, name, title, student, kind, teachers=None, **more):
        config, windows = self.config, self._windows.get(name, self.config.train.micro_batch)
        shape = dataclasses.replace(self.shape, mixing="none") if kind == NTP else self.shape
        supervision = Supervision(
            random_caches(config, self.vocab_size) if kind == CACHED else None,
            (teachers or self.teachers) if kind == ONLINE else None,
        )
        of_teacher = teacher_shape(self.teachers) if kind == ONLINE else None
        batches = training_batches(config, self.split, supervision, self.ranks)
        if windows < config.train.micro_batch:
            batches = ({key: value[:windows] for key, value in batch.items()} for batch in batches)
        self.methods[name] = Method(
            name,
            title,
            student,
            TrainStep(student.engine, supervision, self.ranks),
            batches,
            windows,
            training_flops(shape, of_teacher),
            training_flops(shape, of_teacher) - training_flops(shape),
            **more,
        )

    def _first_steps(self, method):
        """The first step, which allocates what stays and compiles; the peak of the second; then a few more."""
        kept, _ = self._fitting(method.name, kept_bytes, method.step)
        if not any(other.peak_bytes for other in self.methods.values() if other.student is method.student):
            method.student.kept_bytes += kept
        peak, _ = self._fitting(method.name, peak_bytes, method.step)
        teacher_bytes = self.teacher_bytes if method.train_step.supervision.teachers else 0
        method.peak_bytes = method.student.kept_bytes + teacher_bytes + peak
        for _ in range(_WARM_UP[self.ranks.device.type]):
            method.step()

    def _fitting(self, name, measure, function):
        try:
            return measure(function, self.ranks.device)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        raise OutOfMemory(name)  # here, where no traceback holds the tensors of the failed call

    def close(self) -> None:
        """Release engines, teacher and memory."""
        for engine in {id(method.student): method.student.engine for method in self.methods.values()}.values():
            engine.destroy()
        self.methods.clear()
        self.teachers = {}
        torch.compiler.reset()  # a graph of another batch size would make the next one dynamic
        give_memory_back(self.ranks.device)

    # Measuring

    def measure(self) -> None:
        """The rounds: the products' rates, all methods in turn as in training, and all methods in turn with marks.

        So each follows another method, plain and with marks alike. Every other round goes backwards.
        """
        for number in range(self.rounds):
            for dtype, product in self._products.items():
                self.rates[dtype].append(product.measure())
            methods = list(self.methods.values())[:: -1 if number % 2 else 1]
            for method in methods:
                self._time(method)
            for method in methods:
                if self.options.breakdown and method.has_parts:
                    method.parts.append(self._marked(method))

    def _time(self, method):
        """Seconds of a step; the host waits for the device at the ends of the round's steps alone."""
        timeline = Timeline(self.ranks.device)
        self.ranks.barrier()
        synchronize(self.ranks.device)
        with marked_updates(method.train_step, timeline):
            start = time.perf_counter()
            timeline.start()
            for _ in range(self.steps):
                method.step()
            timeline.finish()
            synchronize(self.ranks.device)
            seconds = time.perf_counter() - start
        method.seconds.append(seconds / self.steps)
        method.update_seconds.append(timeline.seconds()[OPTIMIZER] / self.steps)

    def _marked(self, method):
        """Seconds of a step by part."""
        timeline = Timeline(self.ranks.device)
        self.ranks.barrier()
        synchronize(self.ranks.device)
        with marked(method.train_step, timeline):
            timeline.start()
            for _ in range(self.steps):
                method.step()
            timeline.finish()
        return {part: seconds / self.steps for part, seconds in timeline.seconds().items()}

    def trace(self, folder) -> list[Path]:
        """Write a trace of two steps of each method, `FOLDER/METHOD.json.gz`, for Perfetto or chrome://tracing; returns
        the files. Parts are ranges in it, by name."""
        from cocomix.costs.profile_trace import traced

        files = []
        for method in self.methods.values():
            path = Path(folder) / f"{method.name.replace(' ', '-')}.json.gz"
            with traced(path if self.ranks.is_first else None, self.ranks.device):
                timeline = Timeline(self.ranks.device, named=True)
                with marked(method.train_step, timeline):
                    timeline.start()
                    for _ in range(_TRACED_STEPS):
                        method.step()
                    timeline.finish()
            files.append(path)
        return files


class OutOfMemory(Exception):
    """Method `name` does not fit into the device's memory; `is_ours`: it is not a competitor."""

    def __init__(self, name: str):
        super().__init__(f"{name} does not fit")
        self.name, self.is_ours = name, name in (NTP, CACHED, ONLINE, ALONE)


def _endless(config, options, world):
    train = dataclasses.replace(
        config.train, tokens=_ENDLESS, global_batch=config.train.micro_batch * options.accumulation * world
    )
    return dataclasses.replace(config, train=train)


def _check_against(options, config):
    """Raise `CocomixError` where a competitor cannot do what the config asks for, or is not there."""
    has_public_form = mixes_concepts(config.model.mixing) and learns_from(config) == (CONCEPT_LABELS,)
    has_public_form &= config.teacher.labels_by == "attribution"
    has_public_form &= not config.model.concept_residual and config.model.concept_every == 1
    if PUBLIC in options.against and not has_public_form:
        raise CocomixError(
            "--against public needs model.mixing=interleave or add without concept_residual or concept_every, labels "
            "by attribution and no distillation: the public code knows nothing else"
        )
    if TRANSFORMERS in options.against and config.train.zero_stage == 3:
        raise CocomixError(
            "--against transformers needs train.zero_stage 0, 1 or 2: stage 3 splits the weights under "
            "the modules of our own model"
        )
    if options.against and options.peers is None:
        raise CocomixError(
            f"{' and '.join(options.against)}: the package knows no competitors; run benchmarks/profile_against.py"
        )
