"""A terminal in the place of standard output and standard error."""

import contextlib
import pty
import queue
import sys
import termios
import threading
from collections.abc import Callable, Generator

import pytest

_END = "\0"


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Generator[Callable[[], str]]:
    """Inside, both streams are a terminal of 100 columns; yields a function that returns what it was told since the
    last call, with lines that end as they do in files."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    received = queue.Queue()
    threading.Thread(target=_read, args=(master, received), daemon=True).start()
    with open(slave, "w", encoding="utf-8") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", stream)

        def told() -> str:
            stream.write(_END)
            stream.flush()
            return received.get(timeout=30).replace("\r\n", "\n")

        yield told


def _read(master: int, received: queue.Queue) -> None:
    """Put what the terminal is told into a queue, each part when its end comes."""
    with open(master, encoding="utf-8", newline="") as stream, contextlib.suppress(OSError):  # the other side is closed
        part = ""
        while character := stream.read(1):
            if character == _END:
                received.put(part)
                part = ""
            else:
                part += character
