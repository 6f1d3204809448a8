"""What it costs to look at checksums while training: of windows of tokens and labels, and of a checkpoint's tensors.

    python benchmarks/bench_checksums.py [--seq-len 1024] [--label-topk 4] [--rounds 9] [--json FILE]

One core. "window, unchecked" reads a window of token ids and its labels from files without checksums of their blocks,
"first time" from files with them, none of whose blocks has been read before, "again" once they have. A checkpoint's
tensors are looked at in the background, before they are written. Windows lie in the system's cache: from a disk the
same checks take the same time beside longer reads. Rounds alternate, times are medians with the 10th and 90th
percentile.
"""

import argparse
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from cocomix import LabelCache
from cocomix.core.files import write_json
from cocomix.core.machine import describe
from cocomix.data.token_files import TokenSplit, describe_split
from cocomix.data.tokenizer import token_dtype
from cocomix.distributed.state_file import checksums_of, require_finite

WINDOWS, SHARD_WINDOWS, VOCABULARY = 4096, 512, 50257
TENSOR_ELEMENTS, TENSORS = 1 << 22, 16  # a checkpoint of 256 MiB


def main(arguments=None) -> dict:
    """Measure, print a table, and return the figures."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        times = _rounds(_ways(Path(folder), options), options.rounds)
    megabytes = TENSORS * TENSOR_ELEMENTS * 4 / 1e6
    print(f"{'':34} {'median':>9} {'p10':>9} {'p90':>9}")
    for name, seconds in times.items():
        low, middle, high = np.percentile(seconds, (10, 50, 90))
        scale, unit = (1e6, "us") if name.startswith("window") else (1e3, "ms")
        print(f"{name:34} {scale * middle:9.1f} {scale * low:9.1f} {scale * high:9.1f} {unit}")
    rate = megabytes / 1e3 / np.median(times["CRC-32 of a checkpoint"])
    first, again = (np.median(times[name]) for name in ("window, first time", "window, again"))
    plain = np.median(times["window, unchecked"])
    print(
        f"CRC-32: {rate:.1f} GB/s; a window costs {1e6 * (first - plain):.1f} us more the first time that its blocks "
    )
    print(f"are read, {1e6 * (again - plain):.1f} us more after that")
    figures = {
        "machine": describe(torch.device("cpu")),
        "seq_len": options.seq_len,
        "label_topk": options.label_topk,
        "checkpoint_megabytes": megabytes,
        "seconds": times,
    }
    if options.json:
        write_json(options.json, figures)
    return figures


def _ways(folder: Path, options) -> dict[str, Callable[[], float]]:
    checked, unchecked = _Corpus(folder / "checked", options, True), _Corpus(folder / "unchecked", options, False)
    warm = checked.opened()
    checked.read(warm)
    tensors = {f"x.weight/master/{i}": torch.randn(TENSOR_ELEMENTS) for i in range(TENSORS)}
    return {
        "window, unchecked": lambda: unchecked.read(unchecked.opened()),
        "window, first time": lambda: checked.read(checked.opened()),
        "window, again": lambda: checked.read(warm),
        "CRC-32 of a checkpoint": _timed(lambda: [zlib.crc32(tensor.numpy().data) for tensor in tensors.values()]),
        "its tensors' checksums": _timed(lambda: checksums_of(tensors)),
        "whether they are finite": _timed(lambda: require_finite(tensors, folder)),
        "writing it": _timed(lambda: save_file(tensors, folder / "x.safetensors")),
    }


class _Corpus:
    """Random token ids and labels, on disk, with checksums of their blocks or without."""

    def __init__(self, folder: Path, options, checked: bool):
        folder.mkdir()
        random = np.random.default_rng(0)
        self._folder, self._seq_len, self._checked = folder, options.seq_len, checked
        self._order = random.permutation(WINDOWS)[: options.windows]
        random.integers(0, VOCABULARY, WINDOWS * options.seq_len, dtype=np.uint16).tofile(folder / "train.bin")
        counts = {"tokens": WINDOWS * options.seq_len, "documents": 1, "text_bytes": 1}
        self._split = describe_split(folder, "train", counts, token_dtype(VOCABULARY))
        self._labels = folder / "labels"
        cache = LabelCache.create(
            self._labels,
            n_windows=WINDOWS,
            seq_len=options.seq_len,
            label_topk=options.label_topk,
            fingerprints={"data": self._split.sha256},
            shard_windows=SHARD_WINDOWS,
        )
        for shard in range(cache.n_shards):
            cache.append(shard, random.integers(0, 32768, (SHARD_WINDOWS, options.seq_len, options.label_topk)))

    def opened(self) -> tuple[TokenSplit, LabelCache]:
        """The files as a run opens them, none of whose blocks has been looked at."""
        path, sums = self._folder / "train.bin", self._folder / "train.sums"
        split = TokenSplit(path, self._split.tokens, VOCABULARY, "", sums if self._checked else None)
        cache = LabelCache.open(self._labels)
        if not self._checked:
            for shard in range(cache.n_shards):
                cache._map(shard)._check = None
        return split, cache

    def read(self, opened: tuple[TokenSplit, LabelCache]) -> float:
        """Seconds of a window in an order that jumps about, on average."""
        split, cache = opened
        start = time.perf_counter()
        for index in self._order:
            split.window(int(index), self._seq_len)
            cache.window(int(index))
        return (time.perf_counter() - start) / len(self._order)


def _timed(work: Callable[[], object]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    return measure


def _rounds(ways: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    for measure in ways.values():
        measure()
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, measure in ways.items():
            times[name].append(measure())
    return times


def _parse(arguments):
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--label-topk", type=int, default=4)
    parser.add_argument("--windows", type=int, default=128, help="that are read in a round (default: 128)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", metavar="FILE", help="also write the figures to this file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
