"""Whether two things were made from the same: their settings and fingerprints, compared by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Difference:
    """A setting or fingerprint whose stored value is not the present one; None where there is none."""

    name: str
    stored: Any
    present: Any

    def __str__(self) -> str:
        return f"{self.name} was {self.stored} and is {self.present}"


def differences(
    stored: Mapping[str, Any], present: Mapping[str, Any], names: Iterable[str] | None = None
) -> list[Difference]:
    """What differs between the values of `stored` and `present` under `names`, in their order; without names, of all
    that either has, sorted."""
    compared = sorted(stored.keys() | present.keys()) if names is None else names
    pairs = (Difference(name, stored.get(name), present.get(name)) for name in compared)
    return [pair for pair in pairs if pair.stored != pair.present]
