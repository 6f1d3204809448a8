"""The documents of a token file in an order that has nothing to do with where they came from."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cocomix.core.files import atomic_write, require_space, scratch_folder
from cocomix.data.token_files import scan

_BUCKET_BYTES = 1 << 26
_MOST_BUCKETS = 512  # files that are open at a time; beyond 32 GiB buckets grow instead
_DRAWN = 1 << 16  # random numbers at a time


def shuffle_documents(path: Path, dtype: np.dtype, eot_id: int, seed: int) -> None:
    """Put the documents of a token file, each of which the end-of-text token ends, into a random order: every order is
    equally likely, and it is a pure function of the documents and `seed`.

    Each document goes into a random bucket, the buckets are shuffled one by one and written one after the other, so
    memory holds one bucket at a time, or the longest document. What follows the last end-of-text token stays last. The
    disk holds the file three times meanwhile. Raises `CocomixError` where it has no room for that.
    """
    n_bytes = path.stat().st_size
    require_space(path, 2 * n_bytes)
    n_buckets = min(max(1, -(-n_bytes // _BUCKET_BYTES)), _MOST_BUCKETS)
    random = np.random.default_rng(seed % 2**64)
    with scratch_folder(path) as folder, _progress(n_bytes) as bar, atomic_write(path) as shuffled:
        tail = _distribute(path, dtype, eot_id, [folder / str(number) for number in range(n_buckets)], random, bar)
        for number in range(n_buckets):
            ids = np.fromfile(folder / str(number), dtype)
            (folder / str(number)).unlink()
            ends = np.flatnonzero(ids == eot_id) + 1
            starts = np.append(0, ends[:-1])
            for document in random.permutation(len(ends)).tolist():
                shuffled.write(ids[starts[document] : ends[document]].data)
            bar.update(ids.nbytes)
        shuffled.write(tail.data)


def _distribute(path: Path, dtype: np.dtype, eot_id: int, buckets: list[Path], random, bar) -> np.ndarray:
    """Write every document into one of the buckets; what ends with no end-of-text token is returned."""
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(bucket, "wb")) for bucket in buckets]
        chosen = _choices(len(buckets), random)
        held: list[np.ndarray] = []  # of a document that has not ended yet
        for ids in scan(path, dtype):
            start = 0
            for end in (np.flatnonzero(ids == eot_id) + 1).tolist():
                files[bucket := next(chosen)].writelines(part.data for part in held)
                files[bucket].write(ids[start:end].data)
                start, held = end, []
            if start < len(ids):
                held.append(ids[start:].copy())
            bar.update(ids.nbytes)
        return np.concatenate([np.empty(0, dtype), *held])


def _choices(n_buckets: int, random) -> Iterator[int]:
    while True:
        yield from random.integers(n_buckets, size=_DRAWN).tolist()


def _progress(n_bytes: int):
    return tqdm(desc="shuffling documents", total=2 * n_bytes, unit="B", unit_scale=True, delay=1)
