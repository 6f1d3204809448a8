"""Libraries that only some commands need, and which an installation may lack."""

import contextlib
from collections.abc import Generator

from cocomix.core.errors import CocomixError


@contextlib.contextmanager
def needs(what: str, library: str, install: str) -> Generator[None]:
    """Imports inside the block raise `CocomixError` where the library is not installed; `what` needs it, and
    `pip install` takes `install`."""
    try:
        yield
    except ImportError as error:
        raise CocomixError(f"{what} needs {library}: pip install '{install}' ({error})") from None
