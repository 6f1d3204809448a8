"""Files that are whole or absent: everything is written aside, flushed and renamed into place."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

from cocomix.errors import CocomixError

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def explain_full_disk(path):
    """Turn "no space left on device" inside the block into a `CocomixError` that names `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        raise CocomixError(
            f"no room on disk while writing {path}: free some space there or choose another folder, then run "
            "the same command again; what was complete before is untouched"
        ) from error


def require_space(path, n_bytes: int) -> None:
    """Raise `CocomixError` unless the disk that will hold `path` has `n_bytes` bytes free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise CocomixError(
            f"no room on disk for {path}: it needs {n_bytes / 2**20:,.0f} MiB and {folder} has "
            f"{free / 2**20:,.0f} MiB free; free some space or choose another folder"
        )


@contextlib.contextmanager
def atomic_write(path, mode: str = "wb"):
    """Open a file that appears under `path` only when the block ends without an exception.

    `mode` is "wb" or "w" (UTF-8). Raises `CocomixError` when the disk is full; whatever goes wrong, no partial
    file stays behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with explain_full_disk(path):
            with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path):
    """Yield a folder to fill; it takes the place of `path` only when the block ends without an exception."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        with explain_full_disk(path):
            yield aside
        if path.exists():
            shutil.rmtree(path)
        os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_json(path, value) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def read_json(path, what: str) -> dict:
    """Read a JSON object. `what` names it in the `CocomixError` that a missing or broken file raises."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CocomixError(f"{what} is missing: there is no {path}") from None
    except (OSError, ValueError) as error:
        raise CocomixError(f"{what} cannot be read: {path}: {error}") from None
    if not isinstance(value, dict):
        raise CocomixError(f"{what} cannot be read: {path} holds no JSON object")
    return value


def sha256_of_file(path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
