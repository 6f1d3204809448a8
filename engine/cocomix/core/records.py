"""Dataclasses from what a JSON file holds, checked on the way in."""

from typing import Annotated, Any, TypeVar

import msgspec

from cocomix.core.errors import CocomixError
from cocomix.core.files import AnyPath

Record = TypeVar("Record")
Count = Annotated[int, msgspec.Meta(gt=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


def as_record(kind: type[Record], values: Any, path: AnyPath) -> Record:
    """The dataclass `kind`, whose fields may be dataclasses again, from JSON values by name.

    Keys that it does not know are left out, so that files of later versions can be read. Raises `CocomixError`, naming
    `path` and the key, where one is missing, or where a value has another type than its field or lies outside the
    bounds that its field's `msgspec.Meta` sets.
    """
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise CocomixError(f"{path}: {error}; was it written by another version of cocomix?") from error
