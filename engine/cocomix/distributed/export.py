"""`cocomix export`: a checkpoint of any ZeRO stage as a transformers folder, without the GPUs that made it."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_folder, read_json, require_space, sweep_leftovers
from cocomix.core.manifest import CONCEPT_NAMES, require_sound, write_manifest
from cocomix.core.manifest import FILE as MANIFEST
from cocomix.core.model_names import first_line
from cocomix.distributed.checkpoint import checkpoints_folder, latest_checkpoint, read_trainer_state
from cocomix.distributed.training_state import read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")

_INDEX = "model.safetensors.index.json"
_TRIES = 50  # of checkpoints that their run deletes while they are read


def find_model(path) -> Path:
    """The folder that `path` means: itself (a transformers folder or a checkpoint), the finished model of a run, or
    its latest checkpoint. Raises `CocomixError` where there is no model.

    A run that trains deletes its older checkpoints: what reads one goes through `read_model`.
    """
    path = Path(path)
    if is_checkpoint(path):
        return path
    if _is_place_of_checkpoint(path):  # whose model/ holds no weights
        raise _not_there(path)
    for candidate in (path, path / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    latest = latest_checkpoint(path)
    if latest is None:
        raise CocomixError(
            f"{path} holds no model: expected a transformers folder, a checkpoint, or the folder of a "
            "run that has saved"
        )
    return latest


def read_model(path, read: Callable[[Path], T]) -> T:
    """`read(folder)` of the folder that `path` means, see `find_model`. Where that is the latest checkpoint of a run
    which deletes it meanwhile, `read` is called again with the one that is the latest then.

    Raises `CocomixError` where there is no model, where `path` itself is a checkpoint that is deleted, and where the
    run deletes one after the other; and what `read` raises of a folder that is still there.
    """
    for _ in range(_TRIES):
        folder = find_model(path)
        try:
            return read(folder)
        except Exception:  # whatever a file that has gone makes libraries raise
            if is_checkpoint(folder) or (folder / "config.json").is_file():
                raise
    raise CocomixError(
        f"{path} deletes its checkpoints faster than they can be read: try again when it has finished, or train with a "
        "larger train.keep_checkpoints or train.save_every"
    )


def _is_place_of_checkpoint(folder: Path) -> bool:
    """Whether a run would have a checkpoint at this place, and no other program's model is there."""
    folder = folder.absolute()
    if not folder.name.startswith("step-") or (folder / "config.json").is_file() or len(folder.parents) < 2:
        return False
    return folder.parent == checkpoints_folder(folder.parents[1])


def _not_there(checkpoint: Path) -> CocomixError:
    return CocomixError(
        f"{checkpoint} holds no checkpoint: its run has deleted it, keeping newer ones alone (train.keep_checkpoints), "
        f"or did not save it; name the run, {checkpoint.parents[1]}, for its latest one"
    )


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a run, whose weights lie in pieces."""
    return (folder / "trainer.json").is_file()


def description_folder(folder: Path) -> Path:
    """Where config and tokenizer of what `find_model` found lie."""
    return folder / "model" if is_checkpoint(folder) else folder


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / "run.json").is_file()


def run_of(path) -> Path | None:
    """The folder of the run that a model lies in: `path` or one of the folders above it; None outside of runs."""
    path = Path(os.path.abspath(path))
    return next((folder for folder in (path, *path.parents) if is_run(folder)), None)


def load_model(path) -> "PreTrainedModel":
    """The model of a run, a checkpoint or a transformers folder, in float32, frozen and in evaluation mode.

    Raises `CocomixError` where there is none, and where its files are damaged or incomplete.
    """
    return read_model(path, _load)


def _load(folder: Path) -> "PreTrainedModel":
    from transformers import AutoConfig, AutoModelForCausalLM

    from cocomix.model.pretrained import load_language_model

    if not is_checkpoint(folder):
        return load_language_model(folder)
    weights = _weights_of_checkpoint(folder)
    config = AutoConfig.from_pretrained(folder / "model", trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.load_state_dict(weights, strict=False)  # a tied weight is there once; the rest has been checked
    return model.requires_grad_(False).eval()


def export(source, out, dtype: str = "fp32") -> Path:
    """Write the model of a run, a checkpoint or a transformers folder to `out`, its weights cast to `dtype` ("fp32" or
    "bf16"), with config and tokenizer; returns `out`.

    The weights of a checkpoint are put together from the pieces of all ranks. They are checked against the shapes that
    the config asks for, written aside and renamed. Raises `CocomixError` where `out` exists, where there is no model,
    and where its files are damaged or incomplete.
    """
    out = Path(out)
    sweep_leftovers(out.parent, out.name)  # first, since it may bring back what was there
    if out.exists() or out.is_symlink():
        raise CocomixError(f"{out} exists already: name a folder that does not")
    read_model(source, lambda folder: (export_checkpoint if is_checkpoint(folder) else _copy)(folder, out, dtype))
    return out


def export_checkpoint(checkpoint: Path, out: Path, dtype: str = "fp32") -> None:
    """Write a checkpoint's model to `out`, in the place of what may be there. Raises as `export` does."""
    weights = _weights_of_checkpoint(checkpoint)
    require_space(out, sum(tensor.nbytes for tensor in weights.values()) // (2 if dtype == "bf16" else 1))
    with atomic_folder(out) as aside:
        _copy_description(checkpoint / "model", aside, dtype, but=())
        read_trainer_state(checkpoint)  # deleted first: all has been read while it was there
        _save(weights, aside / "model.safetensors", dtype, {"format": "pt"}, where=checkpoint)
        write_manifest(aside)


def _copy(folder: Path, out: Path, dtype: str) -> None:
    """A transformers folder, file by file: no more than one is in memory."""
    files = _weight_files(folder)
    require_sound(folder)
    _check_shapes(folder, _stored_shapes(files), *_expected_shapes(folder))
    require_space(out, sum(file.stat().st_size for file in files) // (2 if dtype == "bf16" else 1))
    with atomic_folder(out) as aside:
        _copy_description(folder, aside, dtype, but=files)
        written = sum(_cast(file, aside / file.name, dtype) for file in files)
        if (folder / _INDEX).exists():
            _write_index(folder, aside, written)
        write_manifest(aside)


def _copy_description(folder, aside, dtype, but):
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and entry not in but and entry.name not in ("config.json", _INDEX, MANIFEST):
            shutil.copyfile(entry, aside / entry.name)
    if (aside / CONCEPT_NAMES).is_file():
        read_json(aside / CONCEPT_NAMES, "the file of concept names")  # it has no checksum, since people change it
    config = read_json(folder / "config.json", "the model's config")
    config.pop("torch_dtype", None)
    config["dtype"] = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _weights_of_checkpoint(checkpoint):
    """Weights by name, float32, in their shapes."""
    state = read_trainer_state(checkpoint)
    require_sound(checkpoint / "model")
    flat = read_weights(checkpoint / "state", state["save_id"], state["world_size"])
    expected, tied = _expected_shapes(checkpoint / "model")
    sizes = {name: math.prod(shape) for name, shape in expected.items()}
    shapes = {
        name: expected[name] if tensor.numel() == sizes.get(name) else tuple(tensor.shape)
        for name, tensor in flat.items()
    }
    _check_shapes(checkpoint, shapes, expected, tied)
    return {name: tensor.view(shapes[name]) for name, tensor in flat.items()}


def _weight_files(folder):
    """The model's safetensors files. Raises `CocomixError` where one is missing."""
    if (folder / _INDEX).exists():
        names = read_json(folder / _INDEX, "the index of the model's weights").get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CocomixError(f"{folder / _INDEX} names no weights")
        for name in names.values():
            if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
                raise CocomixError(f"{folder / _INDEX} names {name!r}, which is no file of its own folder")
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CocomixError(f"{folder} holds only part of a model: {missing[0].name} is missing")
    return files


def _stored_shapes(files):
    found = {}
    for file in files:
        with _opened(file) as weights:
            found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}
    return found


def _check_shapes(where, found, expected, tied):
    """Raise `CocomixError` unless these are exactly the weights that the config asks for."""
    for name, shape in expected.items():
        if name not in found and name not in tied:
            raise CocomixError(f"{where} is incomplete: {name} is missing from its weights")
        if name in found and found[name] != shape:
            raise CocomixError(
                f"{where} does not fit its config: {name} has shape {list(found[name])} and should have {list(shape)}"
            )
    foreign = sorted(set(found) - set(expected))
    if foreign:
        raise CocomixError(f"{where} does not fit its config: it has no place for {foreign[0]}")


def _expected_shapes(folder):
    """Shapes by name, and the names that another one stands for; from a model without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CocomixError(
            f"{folder / 'config.json'} describes no causal language model: {first_line(error)}"
        ) from None
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return shapes, set(getattr(model, "all_tied_weights_keys", None) or {})


def _opened(file):
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as error:
        raise CocomixError(f"{file} cannot be read: {error}") from None


def _cast(file, target, dtype) -> int:
    """Write one file of weights in another precision; returns the bytes of its tensors."""
    with _opened(file) as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}
        metadata = weights.metadata() or {"format": "pt"}
    return _save(tensors, target, dtype, metadata, where=file)


def _save(tensors, target, dtype, metadata, where) -> int:
    import torch
    from safetensors.torch import save_file

    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise CocomixError(f"{where} holds numbers that are not finite, in {broken[0]}: export an earlier checkpoint")
    tensors = {name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(tensors, target, metadata=metadata)
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_index(folder, aside, written):
    index = read_json(folder / _INDEX, "the index of the model's weights")
    index["metadata"] = {**index.get("metadata", {}), "total_size": written}
    (aside / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
