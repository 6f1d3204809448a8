"""Where the things are that a run was trained with, once its tree has moved, or from another working directory.

`run.json` keeps what the config says, which holds in the working directory of its training alone, and both where that
lay from the run's folder and on the machine (`paths`). Token files are told from others by their fingerprints.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json
from cocomix.core.model_names import HUB
from cocomix.core.output import encodable, note_once
from cocomix.core.records import as_record
from cocomix.data.token_files import SPLITS, TokenFiles
from cocomix.training.run_record import FILE_NAME, Place

DATA, TEACHER, SAE = "data.folder", "teacher.model", "teacher.sae"


def places_of(config: Config) -> dict[str, Place]:
    """Where the config's token files, teacher and SAE lie, by the settings that name them; those on the hub have no
    place."""
    named = {DATA: config.data.folder, TEACHER: config.teacher.model, SAE: config.teacher.sae}
    return {
        key: Place(os.path.relpath(name, config.train.run), _if_encodable(os.path.abspath(name)))
        for key, name in named.items()
        if name and not name.startswith(HUB)
    }


def _if_encodable(path: str) -> str | None:
    return path if encodable(path) else None


def fingerprints_of(tokens: TokenFiles) -> dict[str, str]:
    """SHA-256 of the token files by the names of their splits, as their meta.json has them."""
    return {name: tokens.meta.splits[name].sha256 for name in SPLITS}


def find_data(run: Path, option: str) -> str | None:
    """The token files that the run in `run` was trained on; None where it does not say. `option` names others.

    Raises `CocomixError` where they are not there any more, and where what is there are others. What a run of an
    earlier version says is taken as it is.
    """
    known = _Known.of(run)
    places = known.places(run, DATA)
    if known.paths.get(DATA) is None:
        return places[0] if places else None
    others: list[str] = []
    for folder in filter(lambda place: Path(place, "meta.json").is_file(), places):
        found = fingerprints_of(TokenFiles.open(folder))
        differing = [name for name in SPLITS if known.fingerprints and known.fingerprints.get(name) != found[name]]
        if not differing:
            return known.told(run, DATA, folder)
        others.append(
            f"the SHA-256 of {folder}/{differing[0]}.bin is {found[differing[0]]}, "
            f"that of the run's was {known.fingerprints.get(differing[0])}"
        )
    if others:
        raise CocomixError(
            f"{run} was trained on other token files: {'; '.join(others)}: name the run's with {option} FOLDER"
        )
    raise CocomixError(
        f"the token files that {run} was trained on are gone: there are none in {_listed(places)}; name them with "
        f"{option} FOLDER"
    )


def find_part(run: Path, key: str, remedy: str) -> str | None:
    """The path that `key` (`TEACHER` or `SAE`) named when the run in `run` was trained, as it is to be had from here;
    None where it named nothing. Raises `CocomixError` where nothing is there any more; `remedy` says what to do."""
    known = _Known.of(run)
    places = known.places(run, key)
    if known.paths.get(key) is None:
        return places[0] if places else None
    for place in places:
        if os.path.exists(place):
            return known.told(run, key, place)
    raise CocomixError(f"{key} of {run} is gone: there is nothing at {_listed(places)}; {remedy}")


def _listed(places: list[str]) -> str:
    return " or ".join(places)


@dataclass(frozen=True)
class _Known:
    """What run.json says of places; little in early versions."""

    config: dict[str, Any] = field(default_factory=dict[str, Any])
    paths: dict[str, Place] = field(default_factory=dict[str, Place])
    fingerprints: dict[str, str] = field(default_factory=dict[str, str])

    @classmethod
    def of(cls, run: Path) -> "_Known":
        file = run / FILE_NAME
        stored = read_json(file, "the run's description")
        data = stored.get("data")
        values = {
            "config": stored.get("config") or {},
            "paths": stored.get("paths") or {},
            "fingerprints": (data.get("fingerprints") if isinstance(data, dict) else None) or {},
        }
        return as_record(cls, values, file)

    def written(self, key: str) -> str | None:
        """What the config said."""
        section, _, name = key.partition(".")
        settings = self.config.get(section)
        return settings.get(name) if isinstance(settings, dict) else None

    def places(self, run: Path, key: str) -> list[str]:
        """Where it may be, the likeliest first: as seen from the run, where it lay, from the working directory."""
        name, place = self.written(key), self.paths.get(key)
        if not name or place is None:
            return [name] if name else []
        moved = [os.path.join(folder, place.relative) for folder in (os.path.abspath(run), os.path.realpath(run))]
        likely = (*moved, place.absolute, name)
        return list(dict.fromkeys(os.path.abspath(path) for path in likely if path is not None))

    def told(self, run: Path, key: str, found: str) -> str:
        """The place that was found, with a note where it is neither what the config said nor where it lay; as the
        config said it, where that is the same."""
        name = self.written(key)
        if name is not None and os.path.abspath(name) == found:
            return name
        if found != self.paths[key].absolute:
            note_once(f"{key} of {run} was {self.paths[key].absolute or name}; taken from {found}")
        return found
