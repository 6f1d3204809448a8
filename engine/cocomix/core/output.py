"""What the program says, and what its streams must stand: nobody who reads them (a closed pipe, a terminal that is
gone, a full disk), an encoding that lacks characters, and a terminal that would obey what a name or a text says."""

import contextlib
import os
import re
import sys
from collections.abc import Generator
from typing import Any, TextIO, cast

_LINE_UP = "\x1b[A"  # which tqdm writes by itself
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]|\r(?!\n)")


def printable(text: str) -> str:
    """`text` with its control characters, but for tabs and ends of lines, spelled out: "\\x1b" for ESC."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def encodable(text: str) -> bool:
    """Whether UTF-8 can spell it: bytes of an argument that are no UTF-8, and JSON's halves of pairs, it cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def one_line(text: object) -> str:
    """A message without ends of lines, whatever it quotes."""
    return "; ".join(line.strip() for line in str(text).splitlines() if line.strip())


@contextlib.contextmanager
def any_text_can_be_shown() -> Generator[None]:
    """Inside, standard output and standard error take any text: what their encoding lacks is spelled out ("\\u2013"),
    and where they are terminals, so are control characters. Files and pipes get these as they are."""
    before = sys.stdout, sys.stderr
    for stream in before:
        # Flushing, which is part of it, may fail as well as any write.
        with contextlib.suppress(AttributeError, OSError, ValueError):
            cast(Any, stream).reconfigure(errors="backslashreplace")
    inside = _safe(sys.stdout, _Escaping), _safe(sys.stderr, _EscapingBars)
    sys.stdout, sys.stderr = inside
    try:
        yield
    finally:
        if sys.stdout is inside[0]:  # and not one that has to stay, see below
            sys.stdout = before[0]
        if sys.stderr is inside[1]:
            sys.stderr = before[1]


def _safe(stream: Any, kind: Any) -> Any:
    try:
        return kind(stream) if stream.isatty() else stream
    except (AttributeError, ValueError):  # there is none, or it is closed
        return stream


class _Escaping:
    """A terminal that is shown control characters instead of being told them."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """As of any text stream."""
        self._stream.write(printable(text))
        return len(text)

    def isatty(self) -> bool:
        """False, so that libraries leave out their colours, which would be spelled out too."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class _EscapingBars(_Escaping):
    """The same for standard error, where progress bars begin and end with returns to the start of the line, and move
    up by one where there are several."""

    def write(self, text: str) -> int:
        """As of any text stream."""
        if text == _LINE_UP:
            self._stream.write(text)
            return len(text)
        inner = text.strip("\r")
        before, _, after = text.partition(inner) if inner else (text, "", "")
        self._stream.write(before + printable(inner) + after)
        return len(text)

    def isatty(self) -> bool:
        """True: bars are drawn in place."""
        return True


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
