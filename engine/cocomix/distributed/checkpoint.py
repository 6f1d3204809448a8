"""Checkpoints of a run: the training state in pieces, written while training continues and complete or ignored.

RUN/checkpoints/step-00000100/ holds trainer.json, model/ (the model's config and tokenizer) and state/ (one file a
rank, see `training_state`). Every file is written aside and renamed, and a checkpoint is complete when it has
trainer.json and the files of all ranks: no pointer can name a wrong one, and no rank waits for another to finish.
"""

import os
import secrets
import shutil
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec

from cocomix.core.errors import CocomixError, NotFiniteError
from cocomix.core.files import explain_full_disk, read_json, write_own_json
from cocomix.core.records import as_record
from cocomix.distributed.background_write import BackgroundWriter, failure
from cocomix.distributed.ranks import Ranks
from cocomix.distributed.training_state import adam_steps, load_pieces, publish_weights, state_file_name, state_to_save

_VERSION = 3
_Steps = Annotated[int, msgspec.Meta(ge=0)]


@dataclass(frozen=True)
class _TrainerState:
    """What trainer.json holds at least; the trainer adds what it needs itself."""

    save_id: str
    world_size: Annotated[int, msgspec.Meta(gt=0, le=1 << 24)]
    step: _Steps
    adam_steps: _Steps
    skipped_steps: _Steps
    schedule_steps: _Steps
    identity: dict[str, Any]
    elapsed_s: Annotated[float, msgspec.Meta(ge=0)]


def checkpoints_folder(run) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run) / "checkpoints"


def latest_checkpoint(run) -> Path | None:
    """The newest complete checkpoint of a run, None where there is none."""
    return next(iter(complete_checkpoints(run)), None)


def complete_checkpoints(run) -> list[Path]:
    """The complete checkpoints of a run, newest first, also while it trains, saves and thins them out. Raises
    `CocomixError` where there is no telling."""
    while True:
        begun = begun_checkpoints(run)
        # Oldest first, since one is deleted when a newer one is complete: which is then among those looked at later.
        complete = [folder for folder in reversed(begun) if _is_complete(folder)]
        if complete or begun_checkpoints(run)[:1] == begun[:1]:
            return complete[::-1]


def begun_checkpoints(run) -> list[Path]:
    """The checkpoints of a run, newest first, complete or not. Raises `CocomixError` where their folder is there but
    cannot be listed, or is a link to something that is not."""
    folder = checkpoints_folder(run)
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        if folder.is_symlink():
            raise CocomixError(f"{folder} leads to {os.readlink(folder)}, which is not there: mount its disk") from None
        return []
    except OSError as error:
        raise CocomixError(f"{folder} cannot be listed: {error.strerror}; put that right") from None
    return [folder / name for name in sorted(names, reverse=True) if name.startswith("step-")]


def _is_complete(folder: Path) -> bool:
    if not (folder / "trainer.json").exists():
        return False
    try:
        world = _trainer_json(folder).get("world_size")
        files = set(os.listdir(folder / "state"))
    except FileNotFoundError:  # of the state: not begun, or deleted meanwhile
        return False
    except CocomixError:
        if (folder / "trainer.json").exists():
            raise
        return False  # deleted meanwhile
    if not isinstance(world, int):  # of another version, which whoever reads it says
        return True
    return files.issuperset(state_file_name(rank, world) for rank in range(world))


def _trainer_json(checkpoint: Path) -> dict:
    try:
        return read_json(checkpoint / "trainer.json", "the checkpoint's training state")
    except CocomixError as error:
        raise CocomixError(f"{error}; or move {checkpoint} away to go on from an older checkpoint") from None


class CheckpointWriter:
    """Saves of one run, one at a time. The training step waits for a copy to host memory alone.

    All ranks call each method together. `describe_model` writes what belongs into model/ and may take its time.
    """

    def __init__(self, run, keep: int, describe_model: Callable[[Path], None], ranks: Ranks):
        self._run, self._keep, self._describe_model, self._ranks = Path(run), keep, describe_model, ranks
        self._writer = BackgroundWriter(ranks)
        self._folder = self._written = None

    @property
    def has_failed(self) -> bool:
        """Whether this rank's last file could not be written."""
        return self._written is not None and self._written.done() and self._written.exception() is not None

    def begin(self, engine, step: int, trainer_state: dict) -> None:
        """Copy the state of step `step`, and write it while training continues. `trainer_state` holds JSON values.

        Waits for the last save first and raises what `finish` raises.
        """
        self.finish()
        ranks = self._ranks
        self._folder = folder = checkpoints_folder(self._run) / f"step-{step:08d}"
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)  # what was left of a save that died
        save_id = ranks.from_first(secrets.token_hex(8))
        description = {
            "version": _VERSION,
            "save_id": save_id,
            "world_size": ranks.world,
            "step": step,
            "adam_steps": adam_steps(engine),
            "skipped_steps": engine.skipped_steps,
            "schedule_steps": engine.lr_scheduler.last_epoch,
            **trainer_state,
        }

        def before() -> None:
            if ranks.is_first:
                with explain_full_disk(folder):
                    self._describe_model(folder / "model")
                write_own_json(folder / "trainer.json", description)

        path = folder / "state" / state_file_name(ranks.rank, ranks.world)
        try:
            self._written = self._writer.write(state_to_save(engine, ranks), path, {"save_id": save_id}, before)
        except Exception as error:  # the other ranks are told in `finish`
            self._written = Future()
            self._written.set_exception(error)

    def finish(self) -> Path | None:
        """Wait until the save that was begun is complete on all ranks, and thin out the older ones.

        Returns its folder, None where nothing was begun. Raises `CocomixError` on all ranks where one could not write,
        for example on a full disk, and `NotFiniteError` where there is no state to write: the older checkpoints are
        untouched then.
        """
        written, folder = self._written, self._folder
        if written is None or folder is None:
            return None
        error = failure(written)
        self._written = self._folder = None
        message = self._ranks.first_of(None if error is None else _in_words(error, folder))
        if message is None:
            if self._ranks.is_first:
                self._thin_out()
            return folder
        if self._ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        not_finite = self._ranks.first_of(str(error) if isinstance(error, NotFiniteError) else None)
        raise CocomixError(message) if not_finite is None else NotFiniteError(not_finite)

    def _thin_out(self) -> None:
        """Delete all but the newest complete checkpoints, and what was begun but never finished."""
        kept = complete_checkpoints(self._run)[: self._keep]
        for folder in begun_checkpoints(self._run):
            if folder not in kept:
                (folder / "trainer.json").unlink(missing_ok=True)  # first, so that none is ever complete and gutted
                shutil.rmtree(folder, ignore_errors=True)


def _in_words(error: BaseException, folder: Path) -> str:
    if isinstance(error, CocomixError):
        return str(error)
    return f"{folder} could not be written: {type(error).__name__}: {error}"


def read_trainer_state(checkpoint: Path) -> dict:
    """What a save wrote into trainer.json. Raises `CocomixError` where this version cannot go on from it, and where it
    is damaged."""
    state = _trainer_json(checkpoint)
    if state.get("version") != _VERSION:
        raise CocomixError(f"{checkpoint} was written by another version of cocomix: go on with that one")
    as_record(_TrainerState, state, checkpoint / "trainer.json", "move the checkpoint away to go on from an older one")
    return state


def load_checkpoint(engine, checkpoint: Path, ranks: Ranks, new_parameters: Collection[str] = ()) -> None:
    """Bring a fresh engine to a checkpoint's state (all ranks call this), whatever ranks and stage it was saved with.
    The `new_parameters`, which the checkpoint lacks, stay as they are.

    Raises `CocomixError` on all ranks where a file is missing, damaged or of another save.
    """
    state, problem = read_trainer_state(checkpoint), None
    try:
        saved = (state["save_id"], state["world_size"], state["adam_steps"])
        load_pieces(engine, checkpoint / "state", *saved, ranks, new_parameters)
    except CocomixError as error:  # on this rank alone
        problem = str(error)
    problem = ranks.first_of(problem)
    if problem is not None:
        raise CocomixError(f"{checkpoint} cannot be loaded: {problem}. Move it away to go on from the one before it")
    publish_weights(engine)
    engine.global_steps, engine.skipped_steps = state["step"], state["skipped_steps"]
    set_schedule(engine.lr_scheduler, state["schedule_steps"])


def set_schedule(schedule, steps: int) -> None:
    """Go to where the schedule stands after `steps` steps; the rates come from the config, not from the checkpoint."""
    rates = [peak * factor(steps) for peak, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.last_epoch, schedule._last_lr = steps, rates
