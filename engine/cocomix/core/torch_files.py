"""Files of torch.save: zip archives, whose checksums torch.load does not look at."""

import io
import zipfile
from pathlib import Path
from typing import Any

import torch

from cocomix.core.files import AnyPath


class DamagedArchive(Exception):
    """A member of the archive is not as it was written."""


def load_tensors(path: AnyPath, device: torch.device | str = "cpu") -> Any:
    """What torch.save wrote to `path`, tensors and plain values alone, on `device`; nothing is unpickled.

    Raises `DamagedArchive` where a checksum of the archive does not hold, and whatever torch.load raises. Files of
    torch.save before PyTorch 1.6 are no archives and have no checksums.
    """
    content = Path(path).read_bytes()
    if zipfile.is_zipfile(io.BytesIO(content)):
        _require_sound(content)
    return torch.load(io.BytesIO(content), map_location=device, weights_only=True)


def _require_sound(content: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile, zlib and others, according to what is damaged
        raise DamagedArchive(f"it is a damaged archive ({error})") from error
    if damaged is not None:
        raise DamagedArchive(
            f"the checksum of {damaged} in it does not hold, unless it was saved with set_crc32_options(False)"
        )
