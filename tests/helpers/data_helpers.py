"""Text to read and tokenize, and what the tests of more than one module of the data read it with."""

import json
from pathlib import Path

from cocomix.core.config import DataConfig
from cocomix.data.documents import pieces
from cocomix.data.sources import left_out_of, open_sources

PROSE = "The café sells naïve crêpes.\n\n  Don't ask 12345 why; 日本語 🙂 works too.\n\ttabs\r\nand windows lines\n"


def documents_of(*names, **settings) -> list[str]:
    found = {}
    for piece in pieces(open_sources(DataConfig(text=[str(name) for name in names], **settings))):
        found[piece.document] = found.get(piece.document, "") + piece.text
    assert list(found) == list(range(len(found)))
    return list(found.values())


def left_out(*names, **settings) -> dict[str, tuple[int, list[str]]]:
    """What reading all of this leaves out: by reason, how many and the names of the first ones."""
    sources = open_sources(DataConfig(text=[str(name) for name in names], **settings))
    for _ in pieces(sources):
        pass
    return {found.reason: (found.count, [Path(name).name for name in found.first]) for found in left_out_of(sources)}


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def encode_whole(tokenizer, string):
    return tokenizer(string, add_special_tokens=False)["input_ids"]


def story(number: int) -> str:
    return f"Story {number}: the quick brown fox — señor 狐 — jumps over {number * 7} lazy dogs.\n" * 5
