"""What a setting may be, beside its default: `n_layer: int = positive(8)`.

A check takes a setting's value and returns what is wrong with it, in words that follow its name, or None.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

Check = Callable[[Any], str | None]


def checked(default: Any, holds: Callable[[Any], bool], wanted: str) -> Any:
    """A setting of which `holds` must be true; `wanted` says so: "must be ..."."""
    return _setting(default, lambda value: None if holds(value) else wanted)


def positive(default: float, at_most: float = math.inf, because: str = "") -> Any:
    """A setting that must be a finite number above zero and no greater than `at_most`, because of something."""

    def check(value: float) -> str | None:
        if value <= 0:
            return "must be positive"
        return f"must be at most {at_most}: {because}" if value > at_most else None

    return _setting(default, lambda value: _not_finite(value) or check(value))


def not_negative(default: float, at_most: float = math.inf, because: str = "") -> Any:
    """A setting that must be a finite number, zero or above and no greater than `at_most`, because of something."""

    def check(value: float) -> str | None:
        if value < 0:
            return "must not be negative"
        return f"must be at most {at_most}: {because}" if value > at_most else None

    return _setting(default, lambda value: _not_finite(value) or check(value))


def fits_64_bits(value: int) -> bool:
    """Whether random generators take it as a seed."""
    return -(2**63) <= value < 2**63


def one_of(default: Any, choices: tuple[Any, ...], in_words: str | None = None) -> Any:
    """A setting that must be one of `choices`, of which None is called null."""
    names = [str(choice) for choice in choices if choice is not None]
    listed = in_words or (" or ".join(names) if len(names) == 2 else f"one of {', '.join(names)}")
    null = "null or " if None in choices else ""
    return _setting(default, lambda value: None if value in choices else f"is {value!r}; it must be {null}{listed}")


def problems(settings: Any) -> Iterator[str]:
    """What is wrong with the settings of a dataclass instance, each taken alone: "name must be ..."."""
    for setting in dataclasses.fields(settings):
        check: Check | None = setting.metadata.get("check")
        problem = check(getattr(settings, setting.name)) if check else None
        if problem:
            yield f"{setting.name} {problem}"


def _setting(default: Any, check: Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": check})


def _not_finite(value: float) -> str | None:
    return None if math.isfinite(value) else "must be a finite number"
