"""JSON files that the program wrote, changed by hand."""

import json
from pathlib import Path
from typing import Any

from cocomix.core.files import CHECKSUM, read_json


def change_json(path: Path, changes: dict[str, Any], without: tuple[str, ...] = ()) -> None:
    """Change some keys of a JSON file and delete those `without`, its checksum among them."""
    content = read_json(path, "the file") | changes
    path.write_text(json.dumps({key: content[key] for key in content if key not in (*without, CHECKSUM)}), "utf-8")
