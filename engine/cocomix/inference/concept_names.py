"""Names that people give to concepts: a JSON file beside the model, {"4217": "quotes"}."""

from collections.abc import Sequence
from pathlib import Path

from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json, sweep_leftovers, write_json
from cocomix.core.locks import only_writer
from cocomix.core.manifest import CONCEPT_NAMES as FILE

_PATIENCE_S = 10.0  # for another process that is just writing it


def read_names(folder) -> dict[int, str]:
    """Names by concept; none where there is no file. Raises `CocomixError` where the file is broken."""
    path = Path(folder) / FILE
    if not path.exists():
        return {}
    names = read_json(path, "the file of concept names")
    for concept, name in names.items():
        if not concept.isdecimal() or not isinstance(name, str):
            raise CocomixError(f'{path} is broken at {concept!r}: expected entries like "4217": "quotes"')
    return {int(concept): name for concept, name in names.items()}


def add_names(folder, assignments: Sequence[str], n_concepts: int) -> dict[int, str]:
    """Write names given as "4217=quotes" (without a name: forget it) and return all there are now.

    Raises `CocomixError` for an assignment that is none, an id out of range, and a name that another concept has.
    """
    with only_writer(Path(folder) / FILE, "cocomix concepts --name", wait_s=_PATIENCE_S):
        sweep_leftovers(folder, FILE)
        names = _changed(read_names(folder), assignments, n_concepts)
        write_json(Path(folder) / FILE, {str(concept): name for concept, name in names.items()})
    return names


def _changed(names: dict[int, str], assignments: Sequence[str], n_concepts: int) -> dict[int, str]:
    for text in assignments:
        concept, equals, name = text.partition("=")
        name = " ".join(name.split())
        if not equals or not concept.strip().isdecimal():
            raise CocomixError(f"--name {text}: expected ID=NAME, for example 12=quotes")
        number = int(concept)
        if number >= n_concepts:
            raise CocomixError(f"--name {text}: this model has the concepts 0 to {n_concepts - 1}")
        other = next((one for one, its in names.items() if its == name and one != number), None)
        if name and other is not None:
            raise CocomixError(f"--name {text}: concept {other} has this name already")
        if name.isdecimal():
            raise CocomixError(f"--name {text}: a name cannot be a number")
        names[number] = name
    return {concept: names[concept] for concept in sorted(names) if names[concept]}


def called(concept: int, names: dict[int, str]) -> str:
    """How a concept appears in text: its id, and its name where it has one."""
    return f'{concept} "{names[concept]}"' if concept in names else str(concept)


def find_concept(text: str, names: dict[int, str]) -> int:
    """The id that a user wrote as a number or by name. Raises `CocomixError` where it is neither."""
    text = text.strip()
    if text.lstrip("-").isdecimal():
        return int(text)
    for concept, name in names.items():
        if name == text:
            return concept
    known = f"; names: {', '.join(names.values())}" if names else ""
    raise CocomixError(
        f"{text!r} is neither the number of a concept nor a name given with `cocomix concepts --name`{known}"
    )
