"""What a source holds that was not read, or not as it stands: counted by reason, with the first names of each."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

import msgspec

from cocomix.core.errors import CocomixError

BAD_RECORD = "bad record"
EMPTY = "empty"
HOW_TO_SKIP = "; data.on_bad_record=skip leaves such records out"
_NAMES = 3  # that are kept of each reason


@dataclass(frozen=True)
class LeftOut:
    """So many things of a source that were left out for one reason, and the names of the first ones."""

    source: str
    reason: str
    count: Annotated[int, msgspec.Meta(gt=0)]
    first: list[str]

    def __str__(self) -> str:
        names = ", ".join(self.first) + (", ..." if self.count > len(self.first) else "")
        return f"{self.count:,} x {self.reason} ({names})"


class Tally:
    """What one reading of a source has met. `skip_bad`: bad records are counted instead of raised."""

    def __init__(self, source: str, skip_bad: bool = False):
        self.source, self.records, self._skip_bad = source, 0, skip_bad
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}

    def add(self, reason: str, name: object) -> None:
        """Something of this name was left out."""
        self._counts[reason] = self._counts.get(reason, 0) + 1
        names = self._names.setdefault(reason, [])
        if len(names) < _NAMES:
            names.append(str(name))

    def bad(self, place: str, problem: str) -> None:
        """A record that cannot be read. Raises `CocomixError` unless such records are skipped."""
        if not self._skip_bad:
            raise CocomixError(f"{place}: {problem}{HOW_TO_SKIP}")
        self.records += 1
        self.add(BAD_RECORD, place)

    def text(self, text: str | None, place: str) -> list[list[str]]:
        """The document that a record's text is: none where there is nothing in it, which is counted."""
        self.records += 1
        if text and not text.isspace():
            return [[text]]
        self.add(EMPTY, place)
        return []

    def left_out(self) -> list[LeftOut]:
        """All that was counted, in the order in which it was met."""
        return [LeftOut(self.source, reason, count, self._names[reason]) for reason, count in self._counts.items()]

    def require_few_bad(self, max_share: float) -> None:
        """Raise `CocomixError` where more than this share of the records were bad."""
        bad = self._counts.get(BAD_RECORD, 0)
        if bad > max_share * self.records:
            raise CocomixError(
                f"{self.source}: {bad:,} of {self.records:,} records are bad, beginning with "
                f"{self._names[BAD_RECORD][0]}: mend them, or raise data.max_bad_share, which is {max_share:g}"
            )


def say(left_out: Iterable[LeftOut]) -> None:
    """Print each, one a line."""
    for found in left_out:
        print(f"left out of {found.source}: {found}")
