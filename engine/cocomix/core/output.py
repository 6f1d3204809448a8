"""What the program says: notes, and output that nobody reads any more (a closed pipe, a terminal that is gone, a full
disk behind standard output)."""

import contextlib
import os
import sys
from collections.abc import Generator
from typing import Any, TextIO

_noted: set[str] = set()


def note_once(text: str) -> None:
    """Say something beside the point on standard error, once a process and on the first rank alone."""
    if text not in _noted and os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
    _noted.add(text)


@contextlib.contextmanager
def lost_output_is_no_error() -> Generator[None]:
    """Inside, and until the interpreter ends, what cannot be written to standard output and standard error is lost
    without an error: work that takes days must not end because nobody reads what it says."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_forgiving(stream) for stream in before)
    try:
        yield
    finally:
        if not _is_broken(sys.stdout) and not _is_broken(sys.stderr):
            sys.stdout, sys.stderr = before


class _Forgiving:
    """A text stream whose writes never fail."""

    def __init__(self, stream: TextIO):
        self._stream, self.is_broken = stream, False

    def write(self, text: str) -> int:
        """As of any text stream; what cannot be written is lost."""
        with self._noticed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As of any text stream."""
        with self._noticed():
            self._stream.flush()

    @contextlib.contextmanager
    def _noticed(self) -> Generator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream is closed
            self.is_broken = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _forgiving(stream: Any) -> Any:
    return None if stream is None else _Forgiving(stream)  # None: it was closed when the interpreter started


def _is_broken(stream: Any) -> bool:
    return isinstance(stream, _Forgiving) and stream.is_broken
