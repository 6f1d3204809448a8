"""Documents written in every format, encoding and packing that text is kept in."""

import bz2
import gzip
import io
import json
import lzma
from functools import partial

import pyarrow
from pyarrow import ipc, parquet

PACKINGS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, codec="zstd", asbytes=True),
}
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16")
COLUMNS = {
    "string": pyarrow.string(),
    "large_string": pyarrow.large_string(),
    "string_view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


def records(texts, **others):
    return [{"id": number, "text": text, **others} for number, text in enumerate(texts)]


def table(texts, column="string"):
    kind = COLUMNS[column]
    array = pyarrow.array(texts, pyarrow.string())
    column = array.dictionary_encode() if column == "dictionary" else array.cast(kind)
    return pyarrow.table({"id": list(range(len(texts))), "text": column})


def json_lines(texts, ascii_only=False):
    return "".join(json.dumps(record, ensure_ascii=ascii_only) + "\n" for record in records(texts))


def json_array(texts, indent=None):
    return json.dumps(records(texts), ensure_ascii=False, indent=indent)


def json_objects(texts):
    return "\n".join(json.dumps(record, ensure_ascii=False, indent=1) for record in records(texts))


def as_parquet(texts, column="string"):
    buffer = io.BytesIO()
    parquet.write_table(table(texts, column), buffer)
    return buffer.getvalue()


def as_arrow(texts, column="string", opened=ipc.new_stream):
    buffer = io.BytesIO()
    rows = table(texts, column)
    with opened(buffer, rows.schema) as writer:
        writer.write_table(rows, max_chunksize=3)
    return buffer.getvalue()


TABLE_FILES = {
    "a.parquet": as_parquet,
    "train-00000-of-00001": as_parquet,
    "a.arrow": as_arrow,
    "b.arrow": partial(as_arrow, opened=ipc.new_file),
    "a.feather": partial(as_arrow, opened=ipc.new_file),
}
