"""Dataclasses from JSON values: nested, bounded, and refused by the name of a key."""

from dataclasses import dataclass
from typing import Annotated

import msgspec
import pytest

from cocomix.core.errors import CocomixError
from cocomix.core.records import as_record


@dataclass(frozen=True)
class Inner:
    rate: float


@dataclass(frozen=True)
class Outer:
    name: str
    count: Annotated[int, msgspec.Meta(gt=0)]
    inner: dict[str, Inner]
    note: str | None = None


GOOD = {"name": "a", "count": 3, "inner": {"x": {"rate": 1}}}


def test_values_become_dataclasses_all_the_way_down():
    assert as_record(Outer, GOOD | {"unknown": 1}, "file") == Outer("a", 3, {"x": Inner(1.0)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "a", "count": 3}, "file: Object missing required field `inner`"),
        (GOOD | {"name": 1}, r"file: Expected `str`, got `int` - at `\$.name`"),
        (GOOD | {"count": 0}, r"file: Expected `int` >= 1 - at `\$.count`"),
        (GOOD | {"count": True}, r"file: Expected `int`, got `bool` - at `\$.count`"),
        (GOOD | {"inner": {"x": {"rate": "fast"}}}, r"file: Expected `float`, got `str` - at `\$.inner\[...\].rate`"),
        (GOOD | {"inner": []}, r"file: Expected `object`, got `array` - at `\$.inner`"),
        ([], "file: Expected `object`, got `array`"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(values, message):
    with pytest.raises(CocomixError, match=message):
        as_record(Outer, values, "file")
