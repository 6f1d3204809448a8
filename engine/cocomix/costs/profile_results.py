"""What a profile found, as `cocomix profile --json` writes it: JSON keys are the names of the fields."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json
from cocomix.core.records import as_record
from cocomix.core.shapes import StudentShape, TeacherShape

KIND = "profile"  # of the file


@dataclass(frozen=True)
class Spread:
    """The median over rounds, the 10th and the 90th percentile."""

    median: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values) -> Self:
        """The spread of numbers."""
        low, median, high = np.percentile(np.asarray(values), [10, 50, 90])
        return cls(float(median), float(low), float(high))


@dataclass(frozen=True)
class Settings:
    """What was run.

    `micro_batch` counts the windows of one rank, `accumulation` the micro batches of a step here and
    `training_accumulation` those of a rank that share an optimizer step in training; a round has `steps` steps.
    `method` and the entries of `learns_from` are for people. `tokens` is "files" or "random", `teacher` "config",
    "random" or None.
    """

    precision: str
    zero_stage: int
    micro_batch: int
    compile: bool
    activation_checkpointing: bool
    attention_backend: str | None
    accumulation: int
    training_accumulation: int
    ranks: int
    seq_len: int
    mixing: str
    method: str
    learns_from: list[str]
    tokens: str
    teacher: str | None
    rounds: int
    steps: int
    teacher_precision: str | None = None  # earlier versions did not say it


@dataclass(frozen=True)
class Parameters:
    """Parameters of the student by next-token prediction, and of the same with the method's."""

    ntp: int
    cocomix: int


@dataclass(frozen=True)
class MethodResults:
    """One method, or a competitor of one.

    `title` is for people; `of` names the method that a competitor competes with. A step, `step_s` seconds, has the
    accumulation's micro batches of `windows` windows a rank and an optimizer step, which takes `update_s` of it.
    `tokens_per_s` is over all ranks, in training; `flops_per_token` and `mfu` are of one rank: what the method needs,
    and the time that this takes at the products' rates over the time measured. `peak_memory_gib` holds the tensors
    alive at once on one rank, weights, optimizer, activations and the teacher.

    `ratio` is its time per token over NTP's in the same round (None for NTP); `ideal_ratio`, of the arithmetic at the
    products' rates, `efficiency` and `break_even_saving` follow from it (None for NTP and its competitors); `slower` is
    a competitor's time per token over that of the method it competes with. `parts`, in the order of `step_parts.PARTS`,
    add up to `parts_s`, the seconds of a step with marks; `parts_over_step` is that over the step without. None where
    they were not measured.
    """

    title: str
    of: str | None
    windows: int
    step_s: Spread
    update_s: Spread
    tokens_per_s: float
    peak_memory_gib: float
    flops_per_token: float
    mfu: float
    ratio: Spread | None
    ideal_ratio: float | None
    efficiency: float | None
    break_even_saving: float | None
    slower: Spread | None
    parts: dict[str, float] | None
    parts_s: float | None
    parts_over_step: Spread | None


@dataclass(frozen=True)
class ProfileResults:
    """A whole profile.

    `machine` is `cocomix.core.machine.describe`'s: device, versions and commit. `product_flops_per_s` is the rate of a
    large square product in the training precision, `teacher_product_flops_per_s` in that of a teacher that works in the
    step. `paper_saving` is the share of training tokens that the paper reports saved by this method, None where it
    reports none. `methods` are by name: "ntp", "cached", "online", "alone", and those of competitors.
    """

    machine: dict[str, Any]
    settings: Settings
    student: StudentShape
    teacher: TeacherShape | None
    parameters: Parameters
    product_flops_per_s: Spread
    paper_saving: float | None
    methods: dict[str, MethodResults]
    teacher_product_flops_per_s: Spread | None = None

    def as_json(self) -> dict[str, Any]:
        """JSON values by key."""
        return {"kind": KIND, **dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, content: dict[str, Any], source) -> Self:
        """The profile in JSON values, of this version or an earlier one; `source` says where they come from.

        Raises `CocomixError` for what is not a profile, and where something in it is missing or of another type.
        """
        if content.get("kind") != KIND:
            raise CocomixError(f"{source} is not a profile: expected what `cocomix profile --json FILE` writes")
        if "modes" in content:  # what version 0.1 called them
            content = {**content, "methods": content["modes"]}
        return as_record(cls, content, source)

    @classmethod
    def read(cls, path) -> Self:
        """What `cocomix profile --json` wrote; raises `CocomixError` as `from_json` does, and where there is none."""
        return cls.from_json(read_json(path, "the profile"), path)
