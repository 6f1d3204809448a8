"""Dataclasses from what a JSON file holds, checked on the way in."""

import math
from typing import Annotated, Any, TypeVar, cast

import msgspec

from cocomix.core.errors import CocomixError
from cocomix.core.files import AnyPath

Record = TypeVar("Record")
Count = Annotated[int, msgspec.Meta(gt=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
# of a file in the same folder as the one that names it
FileName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*\Z")]


def as_record(
    kind: type[Record],
    values: Any,
    path: AnyPath,
    remedy: str = "was it written by another version of cocomix?",
    finite: bool = True,
) -> Record:
    """The dataclass `kind`, whose fields may be dataclasses again, from JSON values by name.

    Keys that it does not know are left out, so that files of later versions can be read. Raises `CocomixError`, naming
    `path` and the key and ending in `remedy`, where one is missing, where a value has another type than its field or
    lies outside the bounds that its field's `msgspec.Meta` sets, and, where all must be `finite`, where one is not.
    """
    if finite and (where := _not_finite(values, "$")) is not None:
        raise CocomixError(f"{path}: Expected a finite number - at `{where}`; {remedy}")
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise CocomixError(f"{path}: {error}; {remedy}") from error


def is_number(value: Any) -> bool:
    """Whether a JSON value is a number (true and false are not)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _not_finite(value: Any, where: str) -> str | None:
    """Where in JSON values there is a number that is not finite."""
    if isinstance(value, float):
        return None if math.isfinite(value) else where
    inner: list[tuple[str, Any]] = []
    if isinstance(value, dict):
        inner = [(f"{where}.{key}", item) for key, item in cast(dict[str, Any], value).items()]
    elif isinstance(value, list):
        inner = [(f"{where}[{number}]", item) for number, item in enumerate(cast(list[Any], value))]
    found = (_not_finite(item, place) for place, item in inner)
    return next((place for place in found if place is not None), None)
