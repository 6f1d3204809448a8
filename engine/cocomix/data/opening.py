"""Files of text as they are opened: unpacked, whatever they were packed with, told by how they begin."""

import contextlib
import io
import lzma
import shutil
import tempfile
import zlib
from collections.abc import Generator
from pathlib import Path
from typing import IO, Any, cast

from cocomix.core.errors import CocomixError
from cocomix.core.extras import needs

PACKED_NAMES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
_BZIP2 = (
    b"1AY&SY",
    b"\x17\x72\x45\x38\x50\x90",
)  # what follows "BZh" and a digit: a block, or the end of an empty file
_MAGIC_BYTES = 10


@contextlib.contextmanager
def explain_unreadable(path: Path) -> Generator[None]:
    """Errors of reading inside the block become `CocomixError`, which names the file."""
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError) as error:
        first_line = (str(error).splitlines() or ["it is damaged"])[0]
        raise CocomixError(f"{path} cannot be read: {first_line}") from error


@contextlib.contextmanager
def open_unpacked(path: Path) -> Generator[IO[bytes]]:
    """The bytes of a file, unpacked as they are read. Raises `CocomixError` for one that cannot be read."""
    with explain_unreadable(path), open(path, "rb") as raw:
        packing = packing_of(raw.read(_MAGIC_BYTES))
        raw.seek(0)
        if packing is None:
            yield raw
        else:
            with _unpacking(path, raw, packing) as file:
                yield file


@contextlib.contextmanager
def unpacked_on_disk(path: Path) -> Generator[Path]:
    """A file of the unpacked bytes, for readers that jump about: the file itself, or else one that is there inside the
    block, where temporary files are."""
    with explain_unreadable(path), open(path, "rb") as raw:
        packed = packing_of(raw.read(_MAGIC_BYTES)) is not None
    if not packed:
        yield path
        return
    with open_unpacked(path) as file, tempfile.NamedTemporaryFile(prefix="cocomix-") as aside:
        shutil.copyfileobj(file, aside)
        aside.flush()
        yield Path(aside.name)


def packing_of(start: bytes) -> str | None:
    """What packed a file that starts so, by fsspec's name of it."""
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    if start.startswith(b"BZh") and start[4:10] in _BZIP2:
        return "bz2"
    if start.startswith(b"\xfd7zXZ\0"):
        return "xz"
    is_skippable = start[1:4] == b"\x2a\x4d\x18" and 0x50 <= start[0] <= 0x5F  # a frame without contents
    return "zstd" if is_skippable or start.startswith(b"\x28\xb5\x2f\xfd") else None


def _unpacking(path: Path, raw: IO[bytes], packing: str) -> Any:
    if packing != "zstd":
        from fsspec.compression import compr

        return cast(Any, compr)[packing](raw, mode="rb")
    with needs(str(path), "pyarrow", "cocomix[data]"):
        import pyarrow
    # fsspec's reader of zstandard, where there is one, may end with the first of several frames
    return io.BufferedReader(cast(Any, pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd")), 1 << 17)
