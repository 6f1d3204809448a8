"""Numbers of every token of a token file kept on disk, in shards that are whole or absent."""

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_write, create_json, read_json, require_space
from cocomix.core.mapped_file import MappedFile
from cocomix.core.origin import Difference, differences

_DTYPE = np.dtype("<u2")
_CHECKSUM_BYTES = 32
_READ_BYTES = 1 << 20
_HASH_CHARACTERS = 64
_ABANDONED_S = 3600  # a shard that is being written changes with every batch of windows
_REMEDY = "run `cocomix labels` again, which makes it anew"
_VERSION = 1
_NAMES = {
    "data": "other token files",
    "teacher": "another teacher",
    "dtype": "a teacher in another precision",
    "seq_len": "another window length",
}


class ShardCache:
    """Numbers of the windows of one token file: uint16 [n_windows, T, width] in shards of `shard_windows` windows.

    A shard is written aside and renamed, so it is complete or not there; its last 32 bytes are the SHA-256 of the
    rest. `fingerprints` (strings by the names of `_NAMES` and `names`) say what the numbers were made from. Shards are
    memory-mapped, a few at a time. Nothing in memory grows with their number but, while they are made, one byte a
    shard; what there is is found in the folder's listing, since a file system of many machines is slow to ask about
    each file.

    A kind of cache is a subclass: it says what it is called, which entry of meta.json its width follows from, which
    fingerprints it has, and how what it holds turns into numbers and back.
    """

    what: str  # "label cache"
    setting: str  # that names its folder
    stem: str  # of its shards' names, and the name of its numbers
    size_key: str  # in meta.json
    names: dict[str, str]  # of fingerprints beside `_NAMES`: what another value means

    def __init__(self, folder, meta: dict):
        self.folder, self._meta = Path(folder), meta
        self.n_windows, self.seq_len, self.size = (meta[key] for key in ("n_windows", "seq_len", self.size_key))
        self.shard_windows, self.fingerprints = meta["shard_windows"], meta["fingerprints"]
        self.flops_per_token: float | None = meta.get("flops_per_token")  # what making it cost; early ones do not tell
        self._shard_name = re.compile(rf"{self.stem}-(\d{{6}}|[1-9]\d{{6,}})\.bin")
        self._part_name = re.compile(rf"\.{self._shard_name.pattern}\..*\.part")
        self._map = functools.lru_cache(maxsize=64)(self._map_shard)

    def __reduce__(self):
        return type(self), (self.folder, self._meta)  # a worker process maps the shards itself

    def _width(self) -> int:
        """Numbers of a token."""
        raise NotImplementedError

    def _encoded(self, values) -> np.ndarray:
        """What `writer` takes, for [n, T, ...] of some windows, as numbers [n, T, width] that uint16 can hold.

        Raises `ValueError` for values that it cannot hold.
        """
        raise NotImplementedError

    @classmethod
    def start(cls, folder, *, n_windows, seq_len, size, fingerprints, shard_windows, flops_per_token=None):
        """Start a cache, or go on with the one that is there. Raises `CocomixError` where that one was made from
        something else, and where the disk has no room for all of it."""
        path = Path(folder) / "meta.json"
        if path.exists():
            cache = cls.open(folder)
            cache.require(fingerprints)
            return cache
        meta = {
            "version": _VERSION,
            "holds": cls.stem,
            "n_windows": n_windows,
            "seq_len": seq_len,
            cls.size_key: size,
            "shard_windows": shard_windows,
            "fingerprints": dict(fingerprints),
            "flops_per_token": flops_per_token,
        }
        cache = cls(folder, meta)
        require_space(folder, n_windows * seq_len * cache._width() * _DTYPE.itemsize)
        if create_json(path, meta):
            return cache
        cache = cls.open(folder)  # another process was faster
        cache.require(fingerprints)
        return cache

    @classmethod
    def open(cls, folder):
        """Open a cache. Raises `CocomixError` where there is none or its description is damaged."""
        path = Path(folder) / "meta.json"
        try:
            meta = read_json(path, f"the {cls.what} {folder}")
        except CocomixError as error:
            raise CocomixError(f"{error}{'' if path.exists() else '; `cocomix labels` makes it'}") from None
        if meta.get("version") != _VERSION:
            raise CocomixError(f"the {cls.what} {folder} has version {meta.get('version')}, expected {_VERSION}")
        holds = meta.get("holds", "labels")  # which was all that there once was
        if holds != cls.stem:
            found, wanted = (stem.replace("-", " ") for stem in (holds, cls.stem))
            raise CocomixError(f"{folder} holds {found}, not {wanted}: name another folder as {cls.setting}")
        missing = {"n_windows", "seq_len", cls.size_key, "shard_windows", "fingerprints"} - set(meta)
        if missing:
            raise CocomixError(
                f"the {cls.what} {folder} is damaged: its meta.json lacks {', '.join(sorted(missing))}; delete the "
                "folder and run `cocomix labels` again"
            )
        return cls(folder, meta)

    def require(self, fingerprints: dict) -> None:
        """Raise `CocomixError`, naming what differs, unless the cache was made from these fingerprints."""
        found = differences(self.fingerprints, fingerprints, fingerprints)
        if found:
            raise CocomixError(
                f"the {self.what} {self.folder} was made from {' and '.join(map(self._in_words, found))}: run "
                f"`cocomix labels` with this config and another {self.setting} folder, or delete the old cache first"
            )

    def _in_words(self, difference: Difference) -> str:
        """What a fingerprint that differs means; the values too, unless they are hashes, which say nothing."""
        stored, present = str(difference.stored), str(difference.present)
        is_hash = max(len(stored), len(present)) >= _HASH_CHARACTERS
        meaning = (_NAMES | self.names)[difference.name]
        return meaning if is_hash else f"{meaning} ({stored}, not {present})"

    @property
    def n_shards(self) -> int:
        """Number of shards, written or not."""
        return -(-self.n_windows // self.shard_windows)

    def windows_of(self, shard: int) -> range:
        """The windows that shard `shard` holds."""
        return range(shard * self.shard_windows, min((shard + 1) * self.shard_windows, self.n_windows))

    def n_missing(self) -> int:
        """Number of shards that are not there yet, from one listing of the folder."""
        return self.n_shards - sum(not is_part for _, _, is_part in self._listing())

    def unclaimed(self, start: int) -> int | None:
        """The first shard from `start` on, and round about, that is neither there nor being written by any process."""
        taken = np.zeros(self.n_shards, dtype=bool)
        for entry, shard, is_part in self._listing():
            taken[shard] |= not (is_part and _is_abandoned(entry))
        free = np.flatnonzero(~taken)
        return int(free[np.searchsorted(free, start) % len(free)]) if len(free) else None

    def remove_abandoned(self) -> None:
        """Delete the half-written shards of processes that were killed."""
        for entry, _, is_part in self._listing():
            if is_part and _is_abandoned(entry):
                Path(entry.path).unlink(missing_ok=True)

    def _listing(self) -> Iterator[tuple[os.DirEntry, int, bool]]:
        """Directory entries of shards, their numbers, and whether they are still being written."""
        with os.scandir(self.folder) as entries:
            for entry in entries:
                whole, part = self._shard_name.fullmatch(entry.name), self._part_name.fullmatch(entry.name)
                if (found := whole or part) and int(found[1]) < self.n_shards:
                    yield entry, int(found[1]), whole is None

    def append(self, shard: int, values) -> None:
        """Write a whole shard: the values of all its windows, as `writer` takes them."""
        with self.writer(shard) as write:
            write(values)

    @contextlib.contextmanager
    def writer(self, shard: int):
        """Yield a function that takes the values of the shard's next windows. The shard appears when the block ends
        and all its windows have come."""
        digest, n_windows, expected = hashlib.sha256(), 0, len(self.windows_of(shard))

        def write(values) -> None:
            nonlocal n_windows
            numbers = self._encoded(values)
            n_windows += len(numbers)
            if numbers.shape[1:] != (self.seq_len, self._width()) or n_windows > expected:
                raise ValueError(
                    f"{self.stem} of shard {shard} have shape {list(numbers.shape)}, expected "
                    f"{[expected, self.seq_len, self._width()]}"
                )
            stored = numbers.astype(_DTYPE).tobytes()
            file.write(stored)
            file.flush()  # so that other processes see that this one lives
            digest.update(stored)

        with atomic_write(self._path(shard)) as file:
            yield write
            if n_windows != expected:
                raise ValueError(f"shard {shard} got {self.stem} of {n_windows} windows, expected {expected}")
            file.write(digest.digest())

    def _numbers(self, index: int) -> np.ndarray:
        """Numbers of one window, int64 [T, width]."""
        if not 0 <= index < self.n_windows:
            raise IndexError(f"window {index} of a {self.what} with {self.n_windows}")
        shard, row = divmod(index, self.shard_windows)
        size = self.seq_len * self._width()
        return self._map(shard).read(row * size, size).reshape(self.seq_len, self._width())

    def require_complete(self, rank: int = 0, world: int = 1) -> None:
        """Raise `CocomixError` unless every shard is there and every `world`-th one, from `rank` on, in full length."""
        missing = self.n_missing()
        if missing:
            raise CocomixError(
                f"the {self.what} {self.folder} is incomplete: {missing} of {self.n_shards} shards are missing; "
                "run `cocomix labels` again, it continues where it stopped"
            )
        for shard in range(rank, self.n_shards, world):
            self._require_sound(shard, self._wrong_size(shard, self._path(shard).stat().st_size))

    def verify(self) -> None:
        """Read everything once and raise `CocomixError` for a shard whose checksum does not hold."""
        self.require_complete()
        for shard in range(self.n_shards):
            self._require_sound(shard, self.damage(shard))

    def damage(self, shard: int) -> str | None:
        """What is wrong with a shard, in words, None where nothing is. Reads all of it, in memory that stays flat.

        Raises `FileNotFoundError` where it is not there.
        """
        with open(self._path(shard), "rb") as file:
            wrong = self._wrong_size(shard, size := os.fstat(file.fileno()).st_size)
            if wrong:
                return wrong
            digest, left = hashlib.sha256(), size - _CHECKSUM_BYTES
            while left and (content := file.read(min(_READ_BYTES, left))):
                digest.update(content)
                left -= len(content)
            return None if file.read() == digest.digest() else "is damaged (its checksum does not hold)"

    def _path(self, shard):
        return self.folder / f"{self.stem}-{shard:06d}.bin"

    def _n_bytes(self, shard):
        return len(self.windows_of(shard)) * self.seq_len * self._width() * _DTYPE.itemsize + _CHECKSUM_BYTES

    def _wrong_size(self, shard, size):
        expected = self._n_bytes(shard)
        return None if size == expected else f"has {size:,} bytes, expected {expected:,}"

    def _require_sound(self, shard, damage):
        if damage:
            raise CocomixError(f"{self._path(shard)} {damage}: {_REMEDY}")

    def _map_shard(self, shard):
        return MappedFile(
            self._path(shard), _DTYPE, self._n_bytes(shard), unit=self.stem.replace("-", " "), remedy=_REMEDY
        )


def _is_abandoned(entry: os.DirEntry) -> bool:
    try:
        return time.time() - entry.stat().st_mtime > _ABANDONED_S
    except FileNotFoundError:  # it has just been finished
        return False
