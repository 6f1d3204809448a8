"""Numbers of every token of a token file kept on disk, in shards that are whole or absent."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_write, create_own_json, read_json, require_space
from cocomix.core.mapped_file import MappedFile
from cocomix.core.origin import Difference, differences
from cocomix.core.output import note_once
from cocomix.core.records import as_record
from cocomix.teacher.shard_layout import ShardLayout, ShardSums, origin_of

_DTYPE = np.dtype("<u2")
_READ_BYTES = 1 << 20
_HASH_CHARACTERS = 64
_ABANDONED_S = 3600  # a shard that is being written changes with every batch of windows
_REMEDY = "run `cocomix labels` again, which makes it anew"
_VERSION = 2
_WITHOUT_BLOCK_SUMS = 1  # a version that is still read and completed
_MOST = 1 << 48  # windows, and anything else that is counted
_NAMES = {
    "data": "other token files",
    "teacher": "another teacher",
    "dtype": "a teacher in another precision",
    "seq_len": "another window length",
}


_Size = Annotated[int, msgspec.Meta(gt=0, lt=_MOST)]


@dataclass(frozen=True)
class CacheMeta:
    """meta.json of a cache. Subclasses add what the width of its numbers follows from."""

    version: int
    n_windows: _Size
    seq_len: _Size
    shard_windows: _Size
    fingerprints: dict[str, str]
    holds: str = "labels"  # which was all that there once was
    flops_per_token: float | None = None  # what making it cost; early ones do not tell

    def origin(self) -> bytes | None:
        """What its shards name as their origin; None where they name none."""
        if self.version == _WITHOUT_BLOCK_SUMS:
            return None
        # Without what is as it is by default, so that a later version may know more of a cache.
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        kept = [name for name in known if known[name] != defaults[name] and name != "flops_per_token"]
        return origin_of({name: known[name] for name in kept})


class ShardCache:
    """Numbers of the windows of one token file: uint16 [n_windows, T, width] in shards of `shard_windows` windows.

    A shard is written aside and renamed, so it is complete or not there; `ShardLayout` says what it holds beside
    numbers. `fingerprints` (strings by the names of `_NAMES` and `names`) say what the numbers were made from, and each
    shard says that it was made from the same. Blocks are compared with their checksums when they are first read. Shards
    are memory-mapped, a few at a time. Nothing in memory grows with their number but, while they are made, one byte a
    shard, and while they are read, one for each 64 KiB that were compared; what there is is found in the folder's
    listing, since a file system of many machines is slow to ask about each file.

    A kind of cache is a subclass: it says what it is called, which entry of meta.json its width follows from, which
    fingerprints it has, and how what it holds turns into numbers and back.
    """

    what: str  # "label cache"
    setting: str  # that names its folder
    stem: str  # of its shards' names, and the name of its numbers
    size_key: str  # in meta.json
    meta_class: type[CacheMeta]
    names: dict[str, str]  # of fingerprints beside `_NAMES`: what another value means

    def __init__(self, folder, meta: CacheMeta):
        self.folder, self._meta = Path(folder), meta
        self.n_windows, self.seq_len, self.size = meta.n_windows, meta.seq_len, getattr(meta, self.size_key)
        self.shard_windows, self.fingerprints = meta.shard_windows, meta.fingerprints
        self.flops_per_token, self._origin = meta.flops_per_token, meta.origin()
        self._shard_name = re.compile(rf"{self.stem}-(\d{{6}}|[1-9]\d{{6,}})\.bin")
        self._part_name = re.compile(rf"\.{self._shard_name.pattern}\..*\.part")
        self._map = functools.lru_cache(maxsize=64)(self._map_shard)
        self._sound_blocks: dict[int, np.ndarray] = {}  # by shard, which blocks hold what their checksums say

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
    def start(cls, folder, *, n_windows, seq_len, size, fingerprints, shard_windows, flops_per_token=None, **more):
        """Start a cache, or go on with the one that is there; `more` is what its kind has in meta.json beside these.
        Raises `CocomixError` where that one was made from something else, and where the disk has no room for all of it.
        """
        path = Path(folder) / "meta.json"
        if path.exists():
            cache = cls.open(folder)
            cache.require(fingerprints)
            return cache
        meta = cls.meta_class(
            version=_VERSION,
            holds=cls.stem,
            n_windows=n_windows,
            seq_len=seq_len,
            shard_windows=shard_windows,
            fingerprints=dict(fingerprints),
            flops_per_token=flops_per_token,
            **{cls.size_key: size},
            **more,
        )
        cache = cls(folder, meta)
        require_space(folder, n_windows * seq_len * cache._width() * _DTYPE.itemsize)
        if create_own_json(path, dataclasses.asdict(meta)):
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
        if meta.get("version") not in (_VERSION, _WITHOUT_BLOCK_SUMS):
            raise CocomixError(f"the {cls.what} {folder} has version {meta.get('version')}, expected {_VERSION}")
        holds = str(meta.get("holds", "labels"))
        if holds != cls.stem:
            found, wanted = (stem.replace("-", " ") for stem in (holds, cls.stem))
            raise CocomixError(f"{folder} holds {found}, not {wanted}: name another folder as {cls.setting}")
        remedy = f"the {cls.what} is damaged: delete {folder} and run `cocomix labels` again"
        cache = cls(folder, as_record(cls.meta_class, meta, path, remedy))
        if cache._origin is None:
            note_once(f"the {cls.what} {folder} was made by an earlier version: damage in it may go unnoticed")
        return cache

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
        sums, n_windows, expected = ShardSums(self._layout(shard)), 0, len(self.windows_of(shard))

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
            sums.update(stored)

        with atomic_write(self._path(shard)) as file:
            yield write
            if n_windows != expected:
                raise ValueError(f"shard {shard} got {self.stem} of {n_windows} windows, expected {expected}")
            file.write(sums.trailer())

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
            wrong = self._wrong_size(shard, os.fstat(file.fileno()).st_size)
            if wrong:
                return wrong
            digest, left = hashlib.sha256(), self._layout(shard).hashed_bytes
            while left and (content := file.read(min(_READ_BYTES, left))):
                digest.update(content)
                left -= len(content)
            if file.read() != digest.digest():
                return "is damaged (its checksum does not hold)"
        layout = self._layout(shard)
        return self._foreign(layout, self._open(shard).bytes_from(layout.data_bytes))

    def _path(self, shard):
        return self.folder / f"{self.stem}-{shard:06d}.bin"

    def _layout(self, shard):
        n_bytes = len(self.windows_of(shard)) * self.seq_len * self._width() * _DTYPE.itemsize
        return ShardLayout(n_bytes, self._origin)

    def _wrong_size(self, shard, size):
        expected = self._layout(shard).n_bytes
        return None if size == expected else f"has {size:,} bytes, expected {expected:,}"

    def _require_sound(self, shard, damage):
        if damage:
            raise CocomixError(f"{self._path(shard)} {damage}: {_REMEDY}")

    def _map_shard(self, shard):
        file, layout = self._open(shard), self._layout(shard)
        if layout.n_sums == 0:
            return file
        sound = self._sound_blocks.setdefault(shard, np.zeros(layout.n_sums, dtype=bool))
        if not sound.all():
            trailer = file.bytes_from(layout.data_bytes)
            self._require_sound(shard, self._foreign(layout, trailer))
            file.check(layout.data_bytes, layout.sums(trailer), sound)
        return file

    def _open(self, shard):
        n_bytes, unit = self._layout(shard).n_bytes, self.stem.replace("-", " ")
        return MappedFile(self._path(shard), _DTYPE, n_bytes, unit=unit, remedy=_REMEDY)

    def _foreign(self, layout: ShardLayout, trailer: bytes) -> str | None:
        """What is wrong with a shard that belongs to another cache."""
        is_own = layout.origin_in(trailer) == self._origin
        return None if is_own else "was not made from what meta.json says"


def _is_abandoned(entry: os.DirEntry) -> bool:
    try:
        return time.time() - entry.stat().st_mtime > _ABANDONED_S
    except FileNotFoundError:  # it has just been finished
        return False
