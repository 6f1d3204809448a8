"""Where a run records its figures: metrics.jsonl, TensorBoard, optionally Weights & Biases, and the progress bar."""

import contextlib
import json
import resource
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from cocomix.core import checksums
from cocomix.core.config import TrainConfig
from cocomix.core.errors import CocomixError
from cocomix.core.extras import needs
from cocomix.core.files import atomic_write, explain_full_disk
from cocomix.core.output import printable
from cocomix.core.records import is_number


def peak_memory_gib(device: torch.device) -> float:
    """Most memory held so far, GiB: allocated on the GPU, or resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kibibytes / 2**20


FILE_NAME = "metrics.jsonl"  # in the folder of a run


class MetricsLog:
    """metrics.jsonl of a run folder, mirrored to TensorBoard and Weights & Biases.

    Opening drops the lines after step `from_step` (what a resumed run will write again). Every line is one JSON
    object with `kind` ("train", "eval", "event" or "summary"), `step` and `tokens`, and a checksum of the rest.
    `n_lines` is how many there are, `step_times` the seconds a step of the training lines, `peak_memory_gib` the
    largest peak that they tell. `settings` are the JSON values of the run's record, of which Weights & Biases knows the
    run by `id`.
    """

    def __init__(self, folder: Path, config: TrainConfig, from_step: int, settings: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE_NAME
        # Of all lines, resumed parts included: reading them again takes seconds in a long run.
        self.n_lines, self.peak_memory_gib = 0, 0.0
        self.step_times: list[float] = []
        self._evaluated: set[int] = set()
        self._keep_until(from_step)
        self._file = open(self._path, "ab", buffering=0)
        self._unwritten, self._survives_full_disk, self._has_said = b"", config.continue_after_failed_save, False
        self._tensorboard = _open_tensorboard(folder, from_step) if config.tensorboard else None
        self._wandb = _open_wandb(folder, config.wandb_project, settings) if config.wandb_project else None

    def write(self, kind: str, step: int, tokens: int, **values) -> None:
        """Append a line and pass its numbers on. Raises `CocomixError` on a full disk, unless
        train.continue_after_failed_save says to go on: lines then follow when there is room again."""
        numbers = {f"{kind}/{name}": value for name, value in values.items() if value is not None}
        with self._explain_full_disk():
            self._append({"kind": kind, "step": step, "tokens": tokens, **values})
            if self._tensorboard is not None:
                for name, value in numbers.items():
                    self._tensorboard.add_scalar(name, value, step)
        self._log_to_wandb(step, tokens, numbers)

    def event(self, event: str, step: int, tokens: int, **values) -> None:
        """Append a line about a single step that was out of the ordinary."""
        with self._explain_full_disk():
            self._append({"kind": "event", "event": event, "step": step, "tokens": tokens, **values})
        loss = values.get("loss")
        self._log_to_wandb(step, tokens, {f"event/{event}": 1} | ({} if loss is None else {"event/loss": loss}))

    def _append(self, record: dict[str, Any]) -> None:
        self._take_in(record)
        self._unwritten += _as_line(record).encode()
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) or 0 :]

    @contextlib.contextmanager
    def _explain_full_disk(self) -> Generator[None]:
        try:
            with explain_full_disk(self._path):
                yield
        except CocomixError as error:
            if not self._survives_full_disk:
                raise
            if not self._has_said:
                tqdm.write(f"training continues, and its figures are written when there is room: {error}", sys.stderr)
            self._has_said = True

    def _log_to_wandb(self, step: int, tokens: int, numbers: dict[str, Any]) -> None:
        if self._wandb is not None:
            # Not as its own step: it drops what is logged for a step that lies before its last, as a resumed run does.
            self._wandb.log({**numbers, "step": step, "tokens": tokens})

    def has_evaluation(self, step: int) -> bool:
        """Whether the evaluation of a step is there: a run that was killed at its end makes it again."""
        return step in self._evaluated

    def close(self) -> None:
        """Flush and close everything. What a full disk keeps from being flushed is lost."""
        with contextlib.suppress(OSError):
            self._file.close()
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _keep_until(self, step: int) -> None:
        if not self._path.exists():
            return
        kept = [record for record in read_metrics(self._path) if record["step"] <= step and record["kind"] != "summary"]
        with atomic_write(self._path, "w") as file:
            file.writelines(map(_as_line, kept))
        for record in kept:
            self._take_in(record)

    def _take_in(self, record: dict[str, Any]) -> None:
        self.n_lines += 1
        if record["kind"] == "eval":
            self._evaluated.add(record["step"])
        elif "step_time_s" in record:  # a training line
            self.step_times.append(record["step_time_s"])
            self.peak_memory_gib = max(self.peak_memory_gib, record["peak_memory_gib"])


_CHECKSUM = "crc32"  # the key of a line's own
_NUMBERS = {  # that a line of a kind holds beside step and tokens, and whoever reads it counts on
    "train": ("ntp_loss", "step_time_s", "tokens_per_s", "peak_memory_gib"),
    "eval": ("loss", "perplexity", "elapsed_s"),
    "summary": ("loss", "perplexity", "tokens_per_s", "step_time_s", "peak_memory_gib", "elapsed_s"),
}


def _as_line(record: dict[str, Any]) -> str:
    return json.dumps(record | {_CHECKSUM: checksums.of_value(record)}) + "\n"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; says on standard error how many are damaged and left out. Raises `CocomixError`
    where it cannot be read."""
    damaged: list[int] = []
    try:
        records = list(readable_lines(path, damaged))
    except OSError as error:
        raise CocomixError(f"{path} cannot be read: {error.strerror}") from None
    if damaged:
        count = f"{len(damaged)} damaged line{'s' * (len(damaged) > 1)}"
        print(f"note: {path}: left out {count}, the first is line {damaged[0]}", file=sys.stderr)
    return records


def readable_lines(path: Path, damaged: list[int] | None = None) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl without their checksums, each with a kind, a step and a number of tokens, and with
    the numbers that its kind promises.

    `damaged` gets the numbers of those that are none; a last line without its end was cut off in mid-write, and is left
    out as if it were not there.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        record = _line(line)
        if record is not None:
            yield record
        elif line.strip() and number < len(lines) and damaged is not None:
            damaged.append(number)


def _line(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode())
        if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
            return None
        if _CHECKSUM in record and record.pop(_CHECKSUM) != checksums.of_parsed(record):
            return None
    except (ValueError, RecursionError):
        return None
    counts = all(type(record.get(key)) is int and record[key] >= 0 for key in ("step", "tokens"))
    return record if counts and all(is_number(record.get(key)) for key in _NUMBERS.get(record["kind"], ())) else None


def _open_tensorboard(folder, from_step):
    with needs("train.tensorboard, which false turns off,", "TensorBoard", "cocomix[train]"):
        from torch.utils.tensorboard import SummaryWriter
    return SummaryWriter(folder / "tensorboard", purge_step=from_step + 1)


def _open_wandb(folder, project, settings):
    with needs("train.wandb_project", "wandb", "cocomix[wandb]"):
        import wandb  # pyright: ignore[reportMissingImports]  an optional library
    identity = settings.get("id") or folder.name  # earlier versions called it by its folder, wherever that lay
    run = wandb.init(project=project, name=folder.name, dir=folder, config=settings, resume="allow", id=identity)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # the axis of all figures
    return run


def progress_bar(title: str, total_steps: int, done: int, shown: bool):
    """A bar over steps on standard error; where that is not a terminal, a line every ten seconds."""
    on_terminal = sys.stderr.isatty()
    return (tqdm if on_terminal else _Lines)(
        total=total_steps,
        initial=done,
        desc=printable(title),  # tqdm adds codes of its own to a title with codes
        unit="step",
        disable=not shown,
        dynamic_ncols=on_terminal,
        mininterval=0.5 if on_terminal else 10.0,
    )


class _Lines(tqdm):
    """A bar for log files: every update is a line of its own."""

    @staticmethod
    def status_printer(file: Any):
        """The function that tqdm shows its text with; tqdm itself ends the last line."""
        separator = ""

        def write(text):
            nonlocal separator
            file.write(separator + text)
            file.flush()
            separator = "\n"

        return write
