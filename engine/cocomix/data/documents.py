"""Documents as they stream by, cut into pieces of bounded length."""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from cocomix.core.errors import CocomixError
from cocomix.data.sources import Source, left_out_of

PIECE_CHARS = 1 << 17
_CUT_SEARCH_CHARS = 1 << 14
# A GPT-2 style pre-tokenizer splits at both places whatever surrounds them, so a cut there changes no token.
_LINE_END = re.compile(r"(?<=\S\n)(?=\S)")
_WORD_END = re.compile(r"(?<=\S)(?= \S)")


class Piece(NamedTuple):
    """A stretch of at most `PIECE_CHARS` characters of document number `document` (0-based over all sources)."""

    document: int
    text: str
    last: bool  # it ends its document


def require_text(source: Source) -> None:
    """Raise `CocomixError` unless the source, or each part of a mixture, yields at least one document; reads no further
    than that one."""
    for part in source.parts:
        require_text(part)
    if next(pieces([source]), None) is None:
        found = "; ".join(str(found) for found in left_out_of([source])) or "no files or records"
        raise CocomixError(f"{source.name}: there is no text in it, but {found}")


def pieces(sources: Iterable[Source]) -> Iterator[Piece]:
    """Stream all documents in order. Documents of nothing but white space are left out and not numbered."""
    document = 0
    for source in sources:
        for strings in source.documents():
            held = None
            for text in _cut(strings):
                if held is not None:
                    yield Piece(document, held, last=False)
                held = text
            if held is not None:
                yield Piece(document, held, last=True)
                document += 1


def _cut(strings: Iterable[str]) -> Iterator[str]:
    rest, first = "", True
    for string in strings:
        for start in range(0, len(string), PIECE_CHARS):
            rest += string[start : start + PIECE_CHARS]
            while len(rest) > PIECE_CHARS:
                end = _cut_position(rest)
                yield _without_lone_surrogates(rest[:end])
                rest, first = rest[end:], False
    if not first or rest.strip():
        yield _without_lone_surrogates(rest)


def _cut_position(text: str) -> int:
    start = max(1, PIECE_CHARS - _CUT_SEARCH_CHARS)
    for boundary in (_LINE_END, _WORD_END):
        ends = [match.start() for match in boundary.finditer(text, start, PIECE_CHARS)]
        if ends:
            return ends[-1]
    return PIECE_CHARS


def _without_lone_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair; UTF-8 cannot
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
