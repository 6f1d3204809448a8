"""Settings in YAML files."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from cocomix.core.errors import CocomixError
from cocomix.core.files import AnyPath
from cocomix.core.model_names import first_line

_DEEPEST = 64  # levels: deeper ones than a few thousand end the process, for the reader calls itself for each
_parse: Callable[..., Iterator[Any]] = getattr(yaml, "parse")  # noqa: B009  PyYAML has no types of its own


def load_yaml(path: AnyPath, what: str) -> Any:
    """What a YAML file holds, as OmegaConf has it. `what` names it where it is missing.

    Raises `CocomixError`, in one line, for a file that is missing, cannot be read, is no YAML or is nested deeply.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        require_shallow(text, path)
        return OmegaConf.load(io.StringIO(text))
    except (FileNotFoundError, IsADirectoryError):
        raise CocomixError(f"no {what} at {path}") from None
    except OSError as error:
        raise CocomixError(f"{path} cannot be read: {error.strerror}") from None
    except CocomixError:
        raise
    except Exception as error:  # YAML's own errors have no common base that OmegaConf promises
        raise CocomixError(_not_yaml(path, error)) from None


def require_shallow(text: str, where: AnyPath) -> None:
    """Raise `CocomixError` where YAML is nested so deeply that reading it could end the process."""
    depth = 0
    for event in _parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise CocomixError(f"{where}, line {event.start_mark.line + 1}: nested more than {_DEEPEST} levels deep")


def _not_yaml(path: AnyPath, error: Exception) -> str:
    """What a YAML reader's error says of a file, in one line with the place in it."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return f"{path} is not valid YAML: {first_line(error)}"
    return f"{path}, line {mark.line + 1}, column {mark.column + 1}: this is not valid YAML: {problem}"
