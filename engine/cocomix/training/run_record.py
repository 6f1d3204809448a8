"""What a run says of itself: `run.json`, written when training starts, and read by whoever looks at the run later."""

import dataclasses
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json, write_own_json
from cocomix.core.methods import MIXING
from cocomix.core.records import Count, Positive, as_record

FILE_NAME = "run.json"
_RENAMED = {"mode": "method", "labels": "concept_labels"}  # keys of version 0.1 and what they are called now


@dataclass(frozen=True)
class DataRecord:
    """What a run trains on: numbers of token ids and of tokens, the perplexity of a unigram model of the training split
    on the validation split, and the splits' SHA-256 by their names (none in runs of earlier versions)."""

    vocab_size: Count
    train_tokens: Count
    val_tokens: Count
    val_unigram_perplexity: Positive
    fingerprints: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Place:
    """Where a file or folder lay when a run was trained: from the run's folder, and on the machine (None where that is
    not UTF-8)."""

    relative: str
    absolute: str | None


@dataclass(frozen=True)
class Branch:
    """The run whose checkpoint another one began with, its folder, and the steps that both have in common.

    `flops` is what that run had cost until then, see `RunRecord.cost`; None in runs of early versions, in which a token
    costs as much before as after.
    """

    run: str
    step: Count
    flops: tuple[tuple[float, float], ...] | None = None


@dataclass(frozen=True)
class RunRecord:
    """One training run. Its JSON keys are the names of the fields.

    `method` is the config's model.mixing; `concept_labels` and `soft_targets` say where these come from ("cached",
    "online", None for nowhere); `flops_per_token` counts forward and backward with the teacher's work where that is
    done online (None in runs of early versions), `supervision_flops_per_token` that work alone, online or when the
    cache was made (None where a cache does not tell); `config` holds the settings by section; `branched_from` is None
    where the run began at its first step; `id` tells the run from others whose folders have the same name (None in runs
    of earlier versions); `paths` says where what its settings name lay, and `teacher_fingerprints` which teacher and
    SAE its concept labels are from, see `training.run_places` (empty in runs of earlier versions).
    """

    name: str
    method: str
    concept_labels: str | None
    soft_targets: str | None
    device: str
    world_size: Count
    parameters: Count
    tokens_per_step: Count
    total_steps: Count
    seq_len: Count
    flops_per_token: Positive | None
    versions: dict[str, str]
    config: dict[str, Any]
    data: DataRecord
    branched_from: Branch | None = None
    supervision_flops_per_token: float | None = None
    id: str | None = None
    paths: dict[str, Place] = field(default_factory=dict[str, Place])
    teacher_fingerprints: dict[str, str] = field(default_factory=dict[str, str])

    def cost(self, tokens: float) -> list[tuple[float, float]] | None:
        """What training on the first `tokens` tokens takes, as the corners of a line from (0, 0) on: tokens, and
        floating-point operations until then. None where the run does not tell."""
        if self.flops_per_token is None:
            return None
        branch = self.branched_from
        shared = [(0.0, 0.0)] if branch is None or branch.flops is None else list(branch.flops)
        start, done = shared[-1]
        if tokens > start:
            return [*shared, (float(tokens), done + (tokens - start) * self.flops_per_token)]
        before = [corner for corner in shared if corner[0] < tokens]
        if not before:
            return shared[:1]
        (left, low), (right, high) = before[-1], shared[len(before)]
        return [*before, (float(tokens), low + (high - low) * (tokens - left) / (right - left))]

    def flops(self, tokens: float) -> float | None:
        """Floating-point operations of training on the first `tokens` tokens; None where the run does not tell."""
        corners = self.cost(tokens)
        return None if corners is None else corners[-1][1]

    def as_json(self) -> dict[str, Any]:
        """JSON values by key."""
        return dataclasses.asdict(self)

    def write(self, run: Path) -> None:
        """Write it into the folder of a run."""
        write_own_json(run / FILE_NAME, self.as_json())

    @classmethod
    def read(cls, run: Path) -> "RunRecord":
        """The record in the folder of a run, of this version or an earlier one.

        Raises `CocomixError` where there is none, or where something in it is missing or cannot be.
        """
        path = run / FILE_NAME
        stored = {_RENAMED.get(key, key): value for key, value in read_json(path, "the run's description").items()}
        later = {"soft_targets": None, "flops_per_token": None}  # which came with later versions
        record = as_record(cls, later | stored, path)
        if record.method not in MIXING:
            raise CocomixError(f"{path}: method is {record.method!r}; it must be one of {', '.join(MIXING)}")
        return record


def new_id() -> str:
    """What no other run is called: 16 hexadecimal digits."""
    return secrets.token_hex(8)


def recorded_id(run: Path) -> str | None:
    """The id of the run in `run`; None where an earlier version began it. Where its record is gone, a new one."""
    return RunRecord.read(run).id if (run / FILE_NAME).is_file() else new_id()


def recorded_branch(run: Path) -> str | None:
    """The folder of the run that the run in `run` began with, None where it says none or nothing is there."""
    branch = RunRecord.read(run).branched_from if (run / FILE_NAME).is_file() else None
    return None if branch is None else branch.run
