"""What a run says of itself: `run.json`, written when training starts, and read by whoever looks at the run later."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json, write_json
from cocomix.core.methods import MIXING

FILE_NAME = "run.json"
_RENAMED = {"mode": "method", "labels": "concept_labels"}  # keys of version 0.1 and what they are called now


@dataclass(frozen=True)
class DataRecord:
    """What a run trains on: numbers of token ids and of tokens, and the perplexity of a unigram model of the training
    split on the validation split."""

    vocab_size: int
    train_tokens: int
    val_tokens: int
    val_unigram_perplexity: float


@dataclass(frozen=True)
class RunRecord:
    """One training run. Its JSON keys are the names of the fields.

    `method` is the config's model.mixing; `concept_labels` and `soft_targets` say where these come from ("cached",
    "online", None for nowhere); `flops_per_token` counts forward and backward with the teacher's work where that is
    done online (None in runs of early versions); `config` holds the settings by section.
    """

    name: str
    method: str
    concept_labels: str | None
    soft_targets: str | None
    device: str
    world_size: int
    parameters: int
    tokens_per_step: int
    total_steps: int
    seq_len: int
    flops_per_token: float | None
    versions: dict[str, str]
    config: dict[str, Any]
    data: DataRecord

    def as_json(self) -> dict[str, Any]:
        """JSON values by key."""
        return dataclasses.asdict(self)

    def write(self, run: Path) -> None:
        """Write it into the folder of a run."""
        write_json(run / FILE_NAME, self.as_json())

    @classmethod
    def read(cls, run: Path) -> "RunRecord":
        """The record in the folder of a run, of this version or an earlier one.

        Raises `CocomixError` where there is none, or where something in it is missing or cannot be.
        """
        path = run / FILE_NAME
        stored = {_RENAMED.get(key, key): value for key, value in read_json(path, "the run's description").items()}
        later: dict[str, Any] = {"soft_targets": None, "flops_per_token": None}  # which came with later versions
        values = later | stored
        _check(values, path)
        data = DataRecord(**{key: values["data"][key] for key in _keys(DataRecord)})
        return cls(**{key: values[key] for key in _keys(cls) if key != "data"}, data=data)


def _keys(record: type) -> list[str]:
    return [field.name for field in dataclasses.fields(record)]


def _check(values: dict[str, Any], path: Path) -> None:
    """Raise `CocomixError`, naming a key, unless `values` are those of a record."""
    missing = [key for key in _keys(RunRecord) if key not in values]
    if isinstance(values.get("data"), dict):
        missing += [f"data.{key}" for key in _keys(DataRecord) if key not in values["data"]]
    if missing:
        raise CocomixError(f"{path} lacks {', '.join(missing)}: was it written by another version of cocomix?")
    for key in ("versions", "config", "data"):
        if not isinstance(values[key], dict):
            raise CocomixError(f"{path}: {key} must be a JSON object, not {values[key]!r}")
    if values["method"] not in MIXING:
        raise CocomixError(f"{path}: method is {values['method']!r}; it must be one of {', '.join(MIXING)}")
    numbers = {key: values[key] for key in ("world_size", "parameters", "tokens_per_step", "total_steps", "seq_len")}
    numbers |= {f"data.{key}": values["data"][key] for key in _keys(DataRecord)}
    if values["flops_per_token"] is not None:
        numbers["flops_per_token"] = values["flops_per_token"]
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise CocomixError(f"{path}: {key} must be a positive number, not {value!r}")
