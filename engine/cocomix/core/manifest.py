"""The checksums of a folder whose files are read whole: a model, a tokenizer, a sparse autoencoder."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from cocomix.core import checksums
from cocomix.core.errors import CocomixError
from cocomix.core.files import AnyPath, read_json, write_own_json
from cocomix.core.records import as_record

FILE = "cocomix_checksums.json"
CONCEPT_NAMES = "concept_names.json"  # which people give and change
_CHANGING = (FILE, CONCEPT_NAMES)
_WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class _File:
    bytes: int
    crc32: str


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, _File]


def write_manifest(folder: AnyPath) -> None:
    """Write the sizes and checksums of all files in `folder`, and below, as they are now."""
    folder = Path(folder)
    found = {path.relative_to(folder).as_posix(): path for path in checksums.files_below(folder)}
    kept = {name: path for name, path in found.items() if name not in _CHANGING}
    files = {name: _File(path.stat().st_size, checksums.of_file(path)) for name, path in kept.items()}
    write_own_json(folder / FILE, dataclasses.asdict(_Manifest(files)))


def require_sound(folder: AnyPath, weights: bool = True) -> bool:
    """Whether `folder` has a manifest; what other programs write has none. Without `weights` those, which are large,
    are not read.

    Raises `CocomixError`, naming the file, where one that the manifest lists is missing or is not as it was. Files that
    came later are none of its business.
    """
    folder = Path(folder)
    if not (folder / FILE).is_file():
        return False
    content = read_json(folder / FILE, "the list of checksums", must_have_checksum=True)  # it holds nothing else
    listed = as_record(_Manifest, content, folder / FILE)
    for name, entry in listed.files.items():
        if weights or not name.endswith(_WEIGHTS):
            _require_as_it_was(folder, name, entry)
    return True


def _require_as_it_was(folder: Path, name: str, entry: _File) -> None:
    path = folder / name
    if not path.is_file():
        raise CocomixError(f"{path} is missing, which {FILE} lists: {_remedy(folder)}")
    size = path.stat().st_size
    if size != entry.bytes:
        raise CocomixError(f"{path} has {size:,} bytes and had {entry.bytes:,}: {_remedy(folder)}")
    if checksums.of_file(path) != entry.crc32:
        raise CocomixError(f"{path} is damaged (its checksum does not hold): {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    return f"copy or make {folder} again, or, where it was changed on purpose, delete {folder / FILE}"
