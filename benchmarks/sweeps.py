"""Sweeps: an operation's training step while one dimension of its shape grows and the others stay."""

from collections.abc import Callable
from dataclasses import replace

from harness import Case, Setting, Shapes

FACTORS = (0.25, 0.5, 1, 2, 4)  # of the base shape
FIELDS = {"N": "tokens", "d": "widths", "C": "concepts", "k": "kept", "T": "length"}  # of `Shapes`, by dimension


def base(setting: Setting) -> Shapes:
    """The shape that sweeps start from, of which operations take the first width. On a GPU it has a quarter of the
    paper's tokens: at all of them the public way runs out of memory, and its curve would end."""
    shapes = setting.shapes
    return replace(shapes, tokens=shapes.tokens // 4) if setting.on_gpu else shapes


def sweep(setting: Setting, dimensions: str, make: Callable[[Setting], Case]) -> list[Case]:
    """Cases at the base shape times each of `FACTORS` in one dimension at a time. `dimensions` are keys of `FIELDS`;
    `make` gives the case at a setting's shapes, of which it takes the first width. The base shape comes once."""
    start, found = base(setting), {}
    for field in (FIELDS[name] for name in dimensions):
        for factor in FACTORS:
            shapes = replace(start, **{field: _times(factor, getattr(start, field))})
            name = f"c{shapes.concepts}-k{shapes.kept}" if "C" in dimensions else ""
            case = make(replace(setting, given=shapes))
            name = f"{case.name}-{name}".removesuffix("-")
            found[name] = replace(case, name=name, targets=())  # targets are for the paper's shapes
    return list(found.values())


def _times(factor, size):
    return tuple(_times(factor, one) for one in size) if isinstance(size, tuple) else max(1, int(factor * size))
