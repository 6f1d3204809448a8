"""How fast text becomes token files, beside the tokenizer alone, tiktoken and datasets.map with the same merges.

    python benchmarks/bench_tokenizing.py [--megabytes 40] [--vocab-size 16384] [--rounds 5] [--json FILE]

The text is the Python standard library's source, a document a file, repeated until it has so many megabytes, as JSON
lines. "cocomix data" reads the file, splits training from validation and writes token files with their checksums.
"tokenizers alone" encodes the same documents, which are in memory already, in its fastest batches, and keeps nothing:
what reading and writing could at most come up to. tiktoken does likewise with its own batches on as many threads as
there are cores; datasets.map reads the file and writes Arrow files of ids, in as many processes as there are cores.
The ids are the same. Rounds alternate; rates are of text, medians with the lowest and highest.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cocomix.core.config import DataConfig
from cocomix.core.files import write_json
from cocomix.core.machine import describe
from cocomix.data.documents import pieces
from cocomix.data.preparation import prepare
from cocomix.data.sources import open_sources
from cocomix.data.tokenizer import END_OF_TEXT, load_tokenizer, train_tokenizer

OURS, ALONE, TIKTOKEN, MAP = "cocomix data", "tokenizers alone", "tiktoken", "datasets.map"
_BATCH = 50  # documents, with which tokenizers is fastest; 1,000 take a third longer
_MAP_BATCH = 1000  # the library's own
_TRAINING_CHARS = 8_000_000  # that the tokenizer is trained on
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""  # GPT-2's


def main(arguments=None) -> dict:
    """Measure, print a table, and return the figures."""
    options = _parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        corpus = _Corpus(Path(folder), options)
        seconds = _rounds(corpus.ways(), options.rounds)
    rates = {name: corpus.n_bytes / 1e6 / np.array(times) for name, times in seconds.items()}
    print(f"{'MB of text a second':24} {'median':>8} {'lowest':>8} {'highest':>8} {'of tokenizers alone':>20}")
    for name, rate in rates.items():
        share = np.median(rate) / np.median(rates[ALONE])
        print(f"{name:24} {np.median(rate):8.2f} {rate.min():8.2f} {rate.max():8.2f} {share:20.2f}")
    figures = {
        "machine": describe(torch.device("cpu")),
        "megabytes": corpus.n_bytes / 1e6,
        "documents": len(corpus.texts),
        "vocab_size": options.vocab_size,
        "seconds": seconds,
    }
    if options.json:
        write_json(options.json, figures)
    return figures


class _Corpus:
    """Documents as JSON lines and in memory, and the same byte-level BPE for every contestant."""

    def __init__(self, folder: Path, options):
        self._folder, self._rounds = folder, 0
        self.texts = list(_documents(options.megabytes * 1_000_000))
        self.n_bytes = sum(len(text.encode()) for text in self.texts)
        self._file = folder / "text.jsonl"
        self._file.write_text("".join(json.dumps({"text": text}) + "\n" for text in self.texts), encoding="utf-8")
        self._tokenizer = train_tokenizer(_first(self.texts, _TRAINING_CHARS), options.vocab_size)
        self._tokenizer.save_pretrained(folder / "tokenizer")
        self._tiktoken = _tiktoken_of(self._tokenizer)
        self._apart = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    def ways(self) -> dict[str, Callable[[], int]]:
        """What each contestant does; returns how many tokens it made, the end-of-text ones aside."""
        return {OURS: self._ours, ALONE: self._alone, TIKTOKEN: self._with_tiktoken, MAP: self._with_map}

    def _ours(self) -> int:
        self._rounds += 1
        files = prepare(
            DataConfig(
                folder=str(self._folder / f"tokens-{self._rounds}"),
                text=[str(self._file)],
                tokenizer=str(self._folder / "tokenizer"),
            )
        )
        return sum(split.tokens - split.documents for split in files.meta.splits.values())

    def _alone(self) -> int:
        encode = self._tokenizer.backend_tokenizer.encode_batch_fast
        batches = (self.texts[start : start + _BATCH] for start in range(0, len(self.texts), _BATCH))
        return sum(len(found) for batch in batches for found in encode(batch, add_special_tokens=False))

    def _with_tiktoken(self) -> int:
        threads = len(os.sched_getaffinity(0))
        return sum(map(len, self._tiktoken.encode_ordinary_batch(self.texts, num_threads=threads)))

    def _with_map(self) -> int:
        self._rounds += 1
        cache = self._folder / f"cache-{self._rounds}"
        return self._apart.submit(_map, self._file, self._folder / "tokenizer", cache).result()


def _map(file: Path, tokenizer_folder: Path, cache: Path) -> int:
    """datasets.map in a process of its own, since it leaves the tokenizers of its process on one core."""
    import datasets

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(str(tokenizer_folder))
    read: Any = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(cache))
    mapped = read.map(
        lambda batch: {"ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        batch_size=_MAP_BATCH,
        num_proc=len(os.sched_getaffinity(0)),
        remove_columns=["text"],
    )
    return sum(len(chunk.flatten()) for chunk in mapped.data.column("ids").chunks)


def _documents(n_bytes: int) -> Iterator[str]:
    """The standard library's files, over and over, each time under another first line."""
    library = ["".join(piece.text for piece in document) for document in _grouped()]
    size, number = 0, 0
    while size < n_bytes:
        text = f"# {number}\n{library[number % len(library)]}"
        size, number = size + len(text.encode()), number + 1
        yield text


def _grouped() -> Iterator[list]:
    held: list = []
    for piece in pieces(open_sources(DataConfig(text=["stdlib"]))):
        held.append(piece)
        if piece.last:
            yield held
            held = []


def _first(texts: list[str], n_chars: int) -> Iterator[str]:
    for text in texts:
        if n_chars <= 0:
            return
        n_chars -= len(text)
        yield text


def _tiktoken_of(tokenizer) -> tiktoken.Encoding:
    """The same merges: bytes of every token, in the order in which they were merged."""
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    ranks = {
        bytes(alphabet[character] for character in token): number
        for token, number in tokenizer.get_vocab().items()
        if token != END_OF_TEXT
    }
    return tiktoken.Encoding("same", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 0})


def _rounds(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, list[float]]:
    counts = {name: work() for name, work in ways.items()}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"they do not make the same tokens: {counts}")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, work in ways.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return times


def _parse(arguments):
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=40.0, help="of text (default: 40)")
    parser.add_argument("--vocab-size", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
