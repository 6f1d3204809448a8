"""One file of a training state: safetensors, with a checksum of every tensor in its metadata."""

import contextlib
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

import torch

from cocomix.core import checksums
from cocomix.core.errors import CocomixError, NotFiniteError
from cocomix.core.output import note_once

_PREFIX = "crc32/"  # of the metadata's keys
_AT_ONCE = 1 << 24  # elements that are looked at together, so that little memory is needed beside them


def checksums_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The checksums of tensors on the CPU, their names, types and shapes included, as metadata of a file."""
    return {f"{_PREFIX}{name}": _checksum(name, tensor) for name, tensor in tensors.items()}


def require_finite(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Raise `NotFiniteError` where a tensor holds numbers that are not finite: no training goes on from those."""
    for name, tensor in tensors.items():
        # A sum is thirty times as fast; it is not finite too where it is out of range, or where a part is not.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not _all_finite(tensor):
            raise NotFiniteError(
                f"{path} is not written: {name} holds numbers that are not finite. Go on from the checkpoint before it "
                "with a lower train.lr, or more train.warmup_steps"
            )


def _all_finite(tensor: torch.Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(_AT_ONCE))


class StateFile:
    """A state file that is open for reading."""

    def __init__(self, path: Path, file: Any):
        self._path, self._file, self._metadata = path, file, file.metadata() or {}
        if not any(key.startswith(_PREFIX) for key in self._metadata):
            note_once(f"{path} was written by an earlier version, without checksums: damage in it may go unnoticed")
            self._metadata = None

    def keys(self) -> list[str]:
        """The names of its tensors."""
        return list(self._file.keys())

    def length(self, name: str) -> int:
        """Elements of a flat tensor."""
        return self._file.get_slice(name).get_shape()[0]

    def tensor(self, name: str) -> torch.Tensor:
        """A tensor. Raises `CocomixError` where it is damaged."""
        tensor = self._file.get_tensor(name)
        if self._metadata is not None and self._metadata.get(f"{_PREFIX}{name}") != _checksum(name, tensor):
            raise CocomixError(f"{self._path} is damaged: the checksum of {name} does not hold")
        return tensor


@contextlib.contextmanager
def open_state_file(path: Path, save_id: str | None = None) -> Generator[StateFile]:
    """Open a file of the save `save_id`, None: of any. Raises `CocomixError` where it is missing, damaged or of another
    save."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if save_id is not None and (file.metadata() or {}).get("save_id") != save_id:
                raise CocomixError(f"{path} belongs to another save")
            yield StateFile(path, file)
    except FileNotFoundError:
        raise CocomixError(f"{path} is missing") from None
    except CocomixError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, IndexError) as error:
        raise CocomixError(f"{path} is damaged: {error}") from error


def _checksum(name: str, tensor: torch.Tensor) -> str:
    label = f"{name} {tensor.dtype} {list(tensor.shape)}"
    return checksums.of_array(label, tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
