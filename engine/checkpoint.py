"""Checkpoints of a run: DeepSpeed's state and the model as a transformers folder, never half.

RUN/checkpoints/step-00000100/ holds DeepSpeed's files, model/ and trainer.json; RUN/checkpoints/latest.json names the
newest complete one. It is written aside and renamed after every rank has finished writing.
"""

import contextlib
import errno
import re
import shutil
from pathlib import Path

from cocomix.distributed import Ranks
from cocomix.errors import CocomixError
from cocomix.files import atomic_folder, explain_full_disk, read_json, write_json

_STATE = "deepspeed"
# How the writers of PyTorch, safetensors and tokenizers, which raise no OSError, say that the disk is full.
_WRITE_FAILED = re.compile(r"os error (27|28|122)\b|inline_container|PytorchStreamWriter|iostream error")


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

    Raises `CocomixError` on a full disk; the older checkpoints are untouched then.
    """
    folder = checkpoints_folder(run) / f"step-{step:08d}"
    if ranks.is_first:
        shutil.rmtree(folder, ignore_errors=True)
    ranks.barrier()
    try:
        with _explain_full_disk(folder):
            engine.save_checkpoint(str(folder), tag=_STATE, client_state={}, save_latest=False)
        save_model(engine, folder / "model", ranks, tokenizer)
        if ranks.is_first:
            write_json(folder / "trainer.json", {"step": step, **trainer_state})
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
    state = _full_precision_state(engine)
    if ranks.is_first:
        with _explain_full_disk(folder), atomic_folder(folder) as aside:
            engine.module.save_pretrained(aside, state_dict=state)
            tokenizer.save_pretrained(aside)
    ranks.barrier()


def load_checkpoint(engine, checkpoint: Path, ranks: Ranks) -> dict:
    """Bring the engine to a checkpoint's state; returns what `trainer_state` held, with `step`.

    Raises `CocomixError` where the checkpoint does not fit this model, number of ranks or ZeRO stage.
    """
    stored = read_json(checkpoint / "model" / "config.json", "the checkpoint's model config")
    own = engine.module.config.to_dict()
    shape = ("n_embd", "n_layer", "n_head", "vocab_size", "n_positions", "mixing", "concept_dim", "concept_topk",
             "insert_layer")
    differing = [f"{key} is {stored.get(key)} there and {own.get(key)} here" for key in shape
                 if stored.get(key) != own.get(key)]
    if differing:
        raise CocomixError(
            f"{checkpoint} was made by a model of another shape: {'; '.join(differing)}. Use the config that the run "
            "was started with, or another train.run"
        )
    state = read_json(checkpoint / "trainer.json", "the checkpoint's training state")
    for key, own_value in (("world_size", ranks.world), ("zero_stage", engine.zero_optimization_stage())):
        if state[key] != own_value:
            raise CocomixError(
                f"{checkpoint} was saved with {key}={state[key]} and this run has {own_value}: resume with the same"
            )
    failure = None
    try:
        path, _ = engine.load_checkpoint(str(checkpoint), tag=_STATE)
        if path is None:
            failure = "DeepSpeed's files are missing"
    except Exception as error:  # whatever a damaged file makes the loader raise, on this rank alone
        failure = f"{type(error).__name__}: {error}"
    if ranks.any(failure is not None):
        raise CocomixError(f"{checkpoint} cannot be loaded: {failure or 'another rank failed'}")
    return state


def _full_precision_state(engine) -> dict:
    from deepspeed.utils import safe_get_full_fp32_param

    state = {}
    for name, parameter in engine.module.named_parameters():
        full = safe_get_full_fp32_param(parameter)
        state[name] = (parameter.detach() if full is None else full).float().cpu().contiguous()
    return state
