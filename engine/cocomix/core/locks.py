"""One writer a folder: a lock that ends with its process.

The lock of FOLDER is the file .FOLDER.lock beside it, which says who holds it. The system's file locks (flock) end with
the process, also when it is killed, and hold on network file systems that have them. Where they are refused, the file
itself is a lease: its holder touches it, and one that was not touched for `LEASE_S` has ended.
"""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO

from cocomix.core.errors import CocomixError
from cocomix.core.files import AnyPath, create_json

LEASE_S = 60.0  # a lease that is older has ended
_TOUCH_S = 10.0
_RETRY_S = 0.1
_LOOKS = 5  # at who holds a lock
_NO_FILE_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


@contextlib.contextmanager
def only_writer(folder: AnyPath, command: str, wait_s: float = 0.0) -> Generator[None]:
    """Inside, no other process writes `folder` (a file or a folder, which need not be there yet).

    `command` is what others are told. Raises `CocomixError` where another process still holds it after `wait_s`
    seconds, naming that and since when, and where the place cannot be written.
    """
    target = Path(os.path.realpath(folder))
    path = target.with_name(f".{target.name}.lock")
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        with contextlib.ExitStack() as held:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                kind = _locked if _has_file_locks(path) else _leased
                _enter(held, lambda: kind(path, folder, command), wait_s)
            except OSError as error:
                raise CocomixError(f"{folder} cannot be written: {error.strerror}; choose another place") from error
            yield
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # it holds something now
                parent.rmdir()


class _Held(CocomixError):
    """Another process has it."""


def _enter(held: contextlib.ExitStack, lock: Callable[[], contextlib.AbstractContextManager[None]], wait_s: float):
    end = time.monotonic() + wait_s
    while True:
        try:
            return held.enter_context(lock())
        except _Held:
            if time.monotonic() >= end:
                raise
            time.sleep(_RETRY_S)


@contextlib.contextmanager
def _locked(path: Path, folder: AnyPath, command: str) -> Generator[None]:
    while True:
        file = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise _refusal(path, folder) from None
        if _is_still(file, path):  # and not what its last holder has just deleted
            break
        file.close()
    with file:
        file.truncate(0)
        json.dump(_description(command), file)
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _has_file_locks(path: Path) -> bool:
    """Whether the file system that `path` lies in has file locks, asked on a file that nobody else has."""
    with _probe(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _NO_FILE_LOCKS:
                raise
            return False
    return True


@contextlib.contextmanager
def _probe(path: Path) -> Generator[IO[str]]:
    """A new file beside `path`, for as long as the block."""
    probe = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with open(probe, "x", encoding="utf-8") as file:
        try:
            yield file
        finally:
            probe.unlink(missing_ok=True)


def _is_still(file: IO[str], path: Path) -> bool:
    try:
        return os.fstat(file.fileno()).st_ino == os.stat(path).st_ino
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _leased(path: Path, folder: AnyPath, command: str) -> Generator[None]:
    with contextlib.suppress(FileNotFoundError):
        if _now(path) - path.stat().st_mtime >= LEASE_S:
            path.unlink()
    if not create_json(path, _description(command)):
        raise _refusal(path, folder)
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_TOUCH_S):
            with contextlib.suppress(OSError):
                os.utime(path)

    toucher = threading.Thread(target=touch, daemon=True)
    toucher.start()
    try:
        yield
    finally:
        ended.set()
        toucher.join()
        path.unlink(missing_ok=True)


def _now(path: Path) -> float:
    """The time by the clock of the file system, which another machine may keep."""
    with _probe(path) as file:
        return os.fstat(file.fileno()).st_mtime


def _description(command: str) -> dict[str, str | int | float]:
    return {"command": command, "process": os.getpid(), "host": socket.gethostname(), "since": time.time()}


def _refusal(path: Path, folder: AnyPath) -> _Held:
    who = "another process"
    for _ in range(_LOOKS):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(held["since"]))
            who = f"{held['command']} (process {held['process']} on {held['host']}, since {since})"
            break
        except (OSError, ValueError, TypeError, KeyError):
            time.sleep(_RETRY_S)  # it has only just taken it, and is about to say so
    return _Held(f"{folder} is being written by {who}: wait for it, end it, or name another folder")
