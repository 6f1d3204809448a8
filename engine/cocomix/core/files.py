"""Files that are whole or absent: everything is written aside, flushed and renamed into place."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any, cast

from cocomix.core import checksums
from cocomix.core.errors import CocomixError

AnyPath = str | os.PathLike[str]
CHECKSUM = "cocomix_checksum"  # the key under which a JSON file carries its own

_UMASK = os.umask(0o077)  # there is no asking for it without setting it, which other threads would notice later on
os.umask(_UMASK)
_REPLACED = ".cocomix-old"  # after the name of a folder that is being replaced
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of file systems without hard links
_ASIDE = re.compile(r"(?<![^/])\.(?P<name>[^/]+)\.[0-9a-f]{8}\.\d+\.part(?=/|$)")  # see `_make_room_aside`
# How safetensors and tokenizers say it, which raise no OSError.
_FULL_DISK_IN_RUST = re.compile(rf"os error ({'|'.join(map(str, _FULL_DISK))})\b")


@contextlib.contextmanager
def explain_full_disk(path: AnyPath) -> Generator[None]:
    """Turn "no space left on device" inside the block into a `CocomixError` that names `path`."""
    try:
        yield
    except CocomixError:
        raise
    except Exception as error:  # the exceptions of libraries that write files have no common base
        if not _means_full_disk(error):
            raise
        raise CocomixError(
            f"no room on disk while writing {path}: free some space there or choose another folder, then run "
            "the same command again; what was complete before is untouched"
        ) from error


def _means_full_disk(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in _FULL_DISK
    return _FULL_DISK_IN_RUST.search(str(error)) is not None


def require_space(path: AnyPath, n_bytes: int) -> None:
    """Raise `CocomixError` unless the disk that will hold `path` has `n_bytes` bytes free."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        needed, there = _size(n_bytes), _size(free)
        if needed == there:
            needed, there = f"{n_bytes:,} bytes", f"{free:,} bytes"
        raise CocomixError(
            f"no room on disk for {path}: it needs {needed} and {folder} has {there} free; free some space or choose "
            "another folder"
        )


def _size(n_bytes: int) -> str:
    for unit, size in (("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= 10 * size:
            return f"{n_bytes / size:,.0f} {unit}"
    return f"{n_bytes:,} bytes"


@contextlib.contextmanager
def _explain_refusal(path: AnyPath) -> Generator[None]:
    """Turn whatever else the system objects to while `path` is put in place into a `CocomixError` that names it."""
    with explain_full_disk(path):
        try:
            yield
        except OSError as error:
            if error.errno in _FULL_DISK:
                raise
            raise CocomixError(
                f"{path} cannot be written: {error.strerror}; choose another place, or put right what is there"
            ) from error


def _make_room_aside(path: Path) -> Path:
    """The name under which a file or folder is written before it takes the name `path`.

    The process's number tells whether its writer still lives; processes on other machines may have the same one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.part")


def final_name(path: str | bytes | int) -> str:
    """The file or folder that `path` is, lies in, or is written aside for: what its user knows of."""
    text = str(path) if isinstance(path, int) else os.fsdecode(path)
    return _ASIDE.sub(lambda found: found["name"], text)


@contextlib.contextmanager
def atomic_path(path: AnyPath) -> Generator[Path]:
    """Yield a name beside `path`; the file that the block writes there takes the name `path` when the block ends
    without an exception. Raises `CocomixError` as `atomic_write` does."""
    path = Path(path)
    with _explain_refusal(path):
        aside = _make_room_aside(path)
    try:
        with explain_full_disk(path):
            yield aside
            _open_to_umask(aside)
            sync_to_disk(aside)
        with _explain_refusal(path):
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_write(path: AnyPath, mode: str = "wb") -> Generator[IO[Any]]:
    """Open a file that appears under `path` only when the block ends without an exception.

    `mode` is "wb" or "w" (UTF-8). Raises `CocomixError` when the disk is full or the place cannot be written;
    whatever goes wrong, no partial file stays behind.
    """
    with atomic_path(path) as aside:
        with _explain_refusal(path):
            file = open(aside, mode, encoding=None if "b" in mode else "utf-8")
        with file:
            yield file


@contextlib.contextmanager
def atomic_folder(path: AnyPath) -> Generator[Path]:
    """Yield a folder to fill; it takes the place of `path` only when the block ends without an exception.

    Its contents reach the disk before it takes the place; an old folder is deleted only after that. A crash of the
    machine in between leaves the old one beside it, as `.NAME.cocomix-old`. Raises `CocomixError` as `atomic_write`
    does.
    """
    given, path = path, Path(os.path.realpath(path))  # a link to a folder elsewhere stays a link
    with _explain_refusal(given):
        aside = _make_room_aside(path)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        aside.mkdir()
    try:
        with explain_full_disk(given):
            yield aside
        with _explain_refusal(given):
            for folder, _, files in os.walk(aside):
                for name in files:
                    _open_to_umask(Path(folder, name))
                for name in (*files, ""):
                    sync_to_disk(Path(folder, name))
            _exchange(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def scratch_folder(path: AnyPath) -> Generator[Path]:
    """Yield a folder for what is needed while the file `path` is made, on the same disk; it goes when the block ends,
    and `sweep_leftovers` deletes what a killed process leaves. Raises `CocomixError` as `atomic_write` does."""
    path = Path(path)
    with _explain_refusal(path):
        aside = _make_room_aside(path)
        aside.mkdir()
    try:
        with explain_full_disk(path):
            yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sweep_leftovers(folder: AnyPath, name: str = "", of_this_process: bool = False) -> None:
    """Delete what killed processes of this machine left half-written in `folder`, of the file or folder `name` there or
    of all; with `of_this_process` also what an earlier attempt in this one did. An old folder that was being replaced
    takes its place again where the new one had not come, and else goes too."""
    for old in Path(folder).glob(f".{glob.escape(name) or '*'}{_REPLACED}"):
        replaced = old.with_name(old.name[1 : -len(_REPLACED)])
        if replaced.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, replaced)
    for part in Path(folder).glob(f".{glob.escape(name) or '*'}.*.part"):
        pid = part.name.split(".")[-2]
        if not pid.isdecimal() or (_is_running(int(pid)) and not (of_this_process and int(pid) == os.getpid())):
            continue
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _open_to_umask(path: Path) -> None:
    """Give a file the mode that any new file has here: safetensors makes its own readable to their owner alone."""
    if not path.is_symlink():
        os.chmod(path, 0o666 & ~_UMASK)


def _exchange(new: Path, path: Path) -> None:
    """Put the folder `new` in the place of `path`, which may be there or not."""
    old = path.with_name(f".{path.name}{_REPLACED}")
    replaces = path.exists()
    if replaces:
        shutil.rmtree(old, ignore_errors=True)
        os.replace(path, old)
    try:
        os.replace(new, path)
    except OSError:
        if replaces:
            os.replace(old, path)
        raise
    sync_to_disk(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync_to_disk(path: Path) -> None:
    """Bring a file's contents or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: AnyPath, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic_write(path, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")


def write_own_json(path: AnyPath, value: dict[str, Any]) -> None:
    """Write as `write_json` does what this program alone will read, with a checksum that `read_json` looks at."""
    write_json(path, value | {CHECKSUM: checksums.of_value(value)})


def create_own_json(path: AnyPath, value: dict[str, Any]) -> bool:
    """Write as `write_own_json` does unless there is a file already; whether it was written. Of several processes that
    try at once one does (but for file systems without hard links), and none sees half of it."""
    return create_json(path, value | {CHECKSUM: checksums.of_value(value)})


def create_json(path: AnyPath, value: Any) -> bool:
    """As `create_own_json`, without a checksum."""
    path = Path(path)
    with _explain_refusal(path):
        aside = _make_room_aside(path)
    try:
        with explain_full_disk(path):
            aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
            sync_to_disk(aside)
        with _explain_refusal(path):
            return _take_free_name(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _take_free_name(aside: Path, path: Path) -> bool:
    try:
        os.link(aside, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if path.exists():
            return False
        os.replace(aside, path)
    return True


def read_json(path: AnyPath, what: str, must_have_checksum: bool = False) -> dict[str, Any]:
    """Read a JSON object, without the checksum that it may carry. `what` names it in the `CocomixError` that a missing,
    broken or damaged file raises."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair, which JSON may name, is no text
    except FileNotFoundError:
        raise CocomixError(f"{what} is missing: there is no {path}") from None
    except RecursionError:
        raise CocomixError(f"{what} cannot be read: {path} is nested too deeply") from None
    except (OSError, ValueError) as error:
        raise CocomixError(f"{what} cannot be read: {path}: {error}") from None
    if not isinstance(value, dict):
        raise CocomixError(f"{what} cannot be read: {path} does not hold a JSON object")
    value = cast(dict[str, Any], value)
    if (CHECKSUM in value or must_have_checksum) and value.pop(CHECKSUM, None) != checksums.of_parsed(value):
        way_out = f"delete {path}" if must_have_checksum else f"delete its key {CHECKSUM}"
        raise CocomixError(
            f"{what} is damaged: the checksum in {path} does not hold; copy it again, or, where it was changed on "
            f"purpose, {way_out}"
        )
    return value


def sha256_of_file(path: AnyPath) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
