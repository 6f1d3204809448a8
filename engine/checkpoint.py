"""Checkpoints of a run: the training state in pieces and the model as a transformers folder, never half.

RUN/checkpoints/step-00000100/ holds state/ (one file a rank, see `training_state`), model/ and trainer.json;
RUN/checkpoints/latest.json names the newest complete one. It is written aside and renamed after every rank has
finished writing.
"""

import contextlib
import errno
import re
import secrets
import shutil
from pathlib import Path

from cocomix.distributed import Ranks
from cocomix.errors import CocomixError
from cocomix.files import atomic_folder, explain_full_disk, read_json, write_json
from cocomix.training_state import adam_steps, load_pieces, publish_weights, save_pieces

_VERSION = 2
# How the writers of safetensors and tokenizers, which raise no OSError, say that the disk is full.
_WRITE_FAILED = re.compile(r"os error (27|28|122)\b")


def checkpoints_folder(run) -> Path:
    """Where a run keeps its checkpoints."""
    return Path(run) / "checkpoints"


def latest_checkpoint(run) -> Path | None:
    """The newest complete checkpoint of a run, None where there is none.

    Raises `CocomixError` where the one that is named has vanished.
    """
    folder = checkpoints_folder(run)
    if not (folder / "latest.json").exists():
        return None
    name = read_json(folder / "latest.json", "the pointer to the latest checkpoint").get("folder")
    if not isinstance(name, str):
        raise CocomixError(f"{folder / 'latest.json'} names no checkpoint: write the folder of a complete one there")
    checkpoint = folder / name
    if not (checkpoint / "trainer.json").exists():
        raise CocomixError(f"{folder / 'latest.json'} names {checkpoint.name}, which is missing or incomplete")
    return checkpoint


def model_folder(path) -> Path:
    """The transformers folder that `path` means: itself, the finished model of a run, or its latest checkpoint's.

    Raises `CocomixError` where there is no model.
    """
    path = Path(path)
    for candidate in (path, path / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    latest = latest_checkpoint(path)
    if latest is not None:
        return latest / "model"
    raise CocomixError(
        f"{path} holds no model: expected a transformers folder, a checkpoint, or the folder of a run that has saved"
    )


def save_checkpoint(engine, run, step: int, trainer_state: dict, ranks: Ranks, keep: int, tokenizer) -> Path:
    """Write a checkpoint (all ranks call this) and thin out the older ones to `keep`.

    `trainer_state` holds JSON values. Raises `CocomixError` on a full disk; the older checkpoints are untouched then.
    """
    folder = checkpoints_folder(run) / f"step-{step:08d}"
    if ranks.is_first:
        shutil.rmtree(folder, ignore_errors=True)
    save_id = ranks.from_first(secrets.token_hex(8))
    try:
        with _explain_full_disk(folder):
            save_pieces(engine, folder / "state", save_id, ranks)
        save_model(engine, folder / "model", ranks, tokenizer)
        if ranks.is_first:
            write_json(folder / "trainer.json", {
                "version": _VERSION, "save_id": save_id, "world_size": ranks.world, "step": step,
                "adam_steps": adam_steps(engine), "skipped_steps": engine.skipped_steps,
                "schedule_steps": engine.lr_scheduler.last_epoch, **trainer_state,
            })
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    ranks.barrier()
    if ranks.is_first:
        write_json(checkpoints_folder(run) / "latest.json", {"step": step, "folder": folder.name})
        _thin_out(folder, keep)
    return folder


def _thin_out(newest: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and what was begun but never finished."""
    others = {folder for folder in newest.parent.glob("step-*") if folder != newest}
    older = sorted(folder for folder in others if folder.name < newest.name and (folder / "trainer.json").exists())
    for folder in others - set(older[max(0, len(older) - (keep - 1)):]):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _explain_full_disk(path):
    with explain_full_disk(path):
        try:
            yield
        except CocomixError:
            raise
        except Exception as error:  # the writers' exceptions have no common base
            if not _WRITE_FAILED.search(str(error)):
                raise
            raise OSError(errno.ENOSPC, str(error), str(path)) from error


def save_model(engine, folder: Path, ranks: Ranks, tokenizer) -> None:
    """Write the model as a transformers folder, from the fp32 master weights (all ranks call this)."""
    state = _full_precision_state(engine, ranks)
    if ranks.is_first:
        with _explain_full_disk(folder), atomic_folder(folder) as aside:
            engine.module.save_pretrained(aside, state_dict=state)
            tokenizer.save_pretrained(aside)
    ranks.barrier()


def read_trainer_state(checkpoint: Path) -> dict:
    """What `save_checkpoint` wrote into trainer.json. Raises `CocomixError` where this version cannot go on from it."""
    state = read_json(checkpoint / "trainer.json", "the checkpoint's training state")
    if state.get("version") != _VERSION:
        raise CocomixError(f"{checkpoint} was written by another version of cocomix: go on with that one")
    return state


def load_checkpoint(engine, checkpoint: Path, ranks: Ranks) -> None:
    """Bring a fresh engine to a checkpoint's state (all ranks call this), whatever ranks and stage it was saved with.

    Raises `CocomixError` on all ranks where a file is missing, damaged or of another save.
    """
    state, failure = read_trainer_state(checkpoint), None
    try:
        load_pieces(engine, checkpoint / "state", state["save_id"], state["world_size"], state["adam_steps"], ranks)
    except CocomixError as error:  # on this rank alone
        failure = str(error)
    if ranks.any(failure is not None):
        raise CocomixError(f"{checkpoint} cannot be loaded: {failure or 'another rank failed'}")
    publish_weights(engine)
    engine.global_steps, engine.skipped_steps = state["step"], state["skipped_steps"]
    _set_schedule(engine.lr_scheduler, state["schedule_steps"])


def _set_schedule(schedule, steps: int) -> None:
    """Go to where the schedule stands after `steps` steps; the rates come from the config, not from the checkpoint."""
    rates = [peak * factor(steps) for peak, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule.last_epoch, schedule._last_lr = steps, rates


def _full_precision_state(engine, ranks: Ranks) -> dict:
    """The fp32 weights by name, gathered one by one, on the first rank; the others keep nothing."""
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        if ranks.is_first:
            state[name] = (parameter.detach() if full is None else full).float().cpu().contiguous()
    return state
