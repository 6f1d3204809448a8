"""`cocomix export`: a checkpoint of any ZeRO stage as a transformers folder, without the GPUs that made it."""

import json
import shutil
from pathlib import Path

from cocomix.checkpoint import model_folder
from cocomix.errors import CocomixError
from cocomix.files import atomic_folder, read_json, require_space

_INDEX = "model.safetensors.index.json"


def export(source, out, dtype: str = "fp32") -> Path:
    """Copy the model of a run, a checkpoint or a transformers folder to `out`, its weights cast to `dtype` ("fp32" or
    "bf16"), with config and tokenizer; returns `out`.

    Every checkpoint holds the whole model in fp32, gathered from DeepSpeed's shards when it was saved. The copy is
    checked against the shapes that its config asks for, written aside and renamed. Raises `CocomixError` where `out`
    exists, where there is no model, and where its files are damaged or incomplete.
    """
    out = Path(out)
    if out.exists() or out.is_symlink():
        raise CocomixError(f"{out} exists already: name a folder that does not")
    folder = model_folder(source)
    files = _weight_files(folder)
    _check(folder, files)
    require_space(out, sum(file.stat().st_size for file in files) // (2 if dtype == "bf16" else 1))
    with atomic_folder(out) as aside:
        for entry in sorted(folder.iterdir()):
            if entry.is_file() and entry not in files and entry.name not in ("config.json", _INDEX):
                shutil.copyfile(entry, aside / entry.name)
        _write_config(folder, aside, dtype)
        written = sum(_cast(file, aside / file.name, dtype) for file in files)
        if (folder / _INDEX).exists():
            _write_index(folder, aside, written)
    return out


def _weight_files(folder):
    """The model's safetensors files. Raises `CocomixError` where one is missing."""
    if (folder / _INDEX).exists():
        names = read_json(folder / _INDEX, "the index of the model's weights").get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CocomixError(f"{folder / _INDEX} names no weights")
        files = [folder / name for name in sorted(set(names.values()))]
    else:
        files = [folder / "model.safetensors"]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise CocomixError(f"{folder} holds no whole model: {missing[0].name} is missing")
    return files


def _check(folder, files):
    """Raise `CocomixError` unless the files hold exactly the weights that the config asks for."""
    found = {}
    for file in files:
        with _opened(file) as weights:
            found |= {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    expected, tied = _expected_shapes(folder)
    for name, shape in expected.items():
        if name not in found and name not in tied:
            raise CocomixError(f"{folder} is incomplete: {name} is missing from its weights")
        if name in found and found[name] != shape:
            raise CocomixError(f"{folder} does not fit its config: {name} has shape {list(found[name])} and should "
                               f"have {list(shape)}")
    foreign = sorted(set(found) - set(expected))
    if foreign:
        raise CocomixError(f"{folder} does not fit its config: it has no place for {foreign[0]}")


def _expected_shapes(folder):
    """Shapes by name, and the names that another one stands for; from a model without memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cocomix import model as _  # noqa: F401  registers the model's type

    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CocomixError(f"{folder / 'config.json'} describes no causal language model: {reason}") from None
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
    import torch
    from safetensors.torch import save_file

    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    with _opened(file) as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
        metadata = weights.metadata() or {"format": "pt"}
    broken = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise CocomixError(f"{file} holds numbers that are not finite, in {broken[0]}: export an earlier checkpoint")
    tensors = {name: tensor.to(wanted) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_file(tensors, target, metadata=metadata)
    return sum(tensor.nbytes for tensor in tensors.values())


def _write_config(folder, aside, dtype):
    config = read_json(folder / "config.json", "the model's config")
    config.pop("torch_dtype", None)
    config["dtype"] = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_index(folder, aside, written):
    index = read_json(folder / _INDEX, "the index of the model's weights")
    index["metadata"] = {**index.get("metadata", {}), "total_size": written}
    (aside / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
