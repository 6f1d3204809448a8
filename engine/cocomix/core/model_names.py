"""Names of models and tokenizers: a folder, or "hf:NAME" for a repository on the Hugging Face hub.

A bare name never reaches the hub: "runs/teacher", given in another working directory than it was meant for, would load
whatever the owner of that name has put there.
"""

import re
from pathlib import Path
from typing import Any

from cocomix.core.errors import CocomixError

HUB = "hf:"
# What transformers is told with every name: run no code that lies beside a model, unpickle nothing.
OF_MODELS: dict[str, Any] = {"trust_remote_code": False, "use_safetensors": True}
OF_TOKENIZERS: dict[str, Any] = {"trust_remote_code": False}


def as_transformers_names_it(name: str | Path) -> str:
    """A folder that is there, or the name on the hub that follows "hf:". Raises `CocomixError` for any other name."""
    text = str(name)
    if text.startswith(HUB):
        return text.removeprefix(HUB)
    if Path(text).is_dir():
        return text
    on_hub = re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", text)
    hint = f"; for what has this name on the Hugging Face hub write {HUB}{text}" if on_hub else ""
    raise CocomixError(f"there is no folder {text}{hint}")


def without_prefix(name: str) -> str:
    """The name as earlier versions wrote it, without "hf:"."""
    return name.removeprefix(HUB)


def first_line(error: BaseException) -> str:
    """What an error of a library says, in one line; where a folder wants code of its own to be run, that."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in str(error):
        return (
            "it asks for code of its own to be run, and no code from a model's folder is: use a model of transformers"
        )
    return text
