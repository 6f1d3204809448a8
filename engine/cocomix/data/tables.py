"""A column of text in Parquet and Arrow files, a few rows at a time."""

import contextlib
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from cocomix.core.errors import CocomixError
from cocomix.core.extras import needs
from cocomix.data.left_out import Tally
from cocomix.data.opening import unpacked_on_disk

_PARQUET_ROWS = 256  # that are read at a time
_PARQUET_BYTES = 1 << 25  # of rows that are read together
# Of a row group that is read as a dictionary, in which a text that stands in many rows is in memory once. A larger one
# would take twice the memory that way.
_REPEATING_BYTES = 1 << 28
_TEXT_TYPES = ("string", "large_string", "string_view", "null")
_ARROW_FILE = b"ARROW1"


def read_parquet(path: Path, text_key: str, tally: Tally) -> Iterator[list[str]]:
    """The text of every row. Raises `CocomixError` for a column that is not there or holds no text, for a damaged file,
    and where pyarrow is missing."""
    with _explained(path), unpacked_on_disk(path) as place:
        from pyarrow import parquet

        with parquet.ParquetFile(place) as file:
            _require_text(path, file.schema_arrow, text_key)
            repeats = [text_key] if _largest_group(file.metadata) <= _REPEATING_BYTES else []
        with parquet.ParquetFile(place, read_dictionary=repeats) as file:
            rows = file.iter_batches(_rows_at_once(file.metadata), columns=[text_key])
            yield from _texts(path, (batch.column(0) for batch in rows), tally)


def read_arrow(path: Path, text_key: str, tally: Tally) -> Iterator[list[str]]:
    """The text of every row of an Arrow file or stream, mapped into memory; errors as of `read_parquet`."""
    with _explained(path), unpacked_on_disk(path) as place:
        import pyarrow
        from pyarrow import ipc

        with pyarrow.memory_map(str(place)) as file:
            is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
            file.seek(0)
            opened = ipc.open_file if is_file else ipc.open_stream
            schema = opened(file).schema
            _require_text(path, schema, text_key)
            file.seek(0)
            only = ipc.IpcReadOptions(included_fields=[schema.get_field_index(text_key)])
            reader: Any = opened(file, options=only)
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            yield from _texts(path, (_sound(batch.column(0)) for batch in batches), tally)


@contextlib.contextmanager
def _explained(path: Path) -> Generator[None]:
    with needs(str(path), "pyarrow", "cocomix[data]"):
        import pyarrow
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the latter for a column's name
        raise CocomixError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error


def _sound(column: Any) -> Any:
    """The same column, after a look at where each text lies: a damaged file may point anywhere in memory."""
    import pyarrow

    try:
        column.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):  # that is a row's own matter
            raise
    return column


def _require_text(path: Path, columns: Any, text_key: str) -> None:
    if text_key not in columns.names:
        raise CocomixError(
            f"{path}: no column {text_key!r}; its columns are {', '.join(columns.names)}; set data.text_key"
        )
    kind = columns.field(text_key).type
    values = kind.value_type if str(kind).startswith("dictionary<") else kind
    if str(values) not in _TEXT_TYPES:
        raise CocomixError(f"{path}: column {text_key!r} holds {kind}, not text; set data.text_key")


def _texts(path: Path, columns: Iterable[Any], tally: Tally) -> Iterator[list[str]]:
    row = 0
    for column in columns:
        for value in column:
            row += 1
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                tally.bad(f"{path}, row {row}", f"not UTF-8: {error}")
                continue
            yield from tally.text(text, f"{path}, row {row}")


def _largest_group(metadata: Any) -> int:
    """Bytes of the largest row group of a Parquet file, unpacked."""
    return max((metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups)), default=0)


def _rows_at_once(metadata: Any) -> int:
    """Rows of a Parquet file that are read together: fewer where they are large."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    largest = max((group.total_byte_size / group.num_rows for group in groups if group.num_rows), default=1.0)
    return max(1, min(_PARQUET_ROWS, int(_PARQUET_BYTES / max(largest, 1.0))))
