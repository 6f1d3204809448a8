"""Concept labels kept on disk: eight bytes a token, in shards that are whole or absent."""

import contextlib
import functools
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cocomix.config import Config
from cocomix.data import TokenFiles
from cocomix.distributed import own_device, rank_and_world
from cocomix.errors import CocomixError
from cocomix.files import atomic_write, read_json, require_space, write_json
from cocomix.mapped_file import MappedFile

_SHARD = re.compile(r"labels-(\d{6}|[1-9]\d{6,})\.bin")
_PART = re.compile(rf"\.{_SHARD.pattern}\..*\.part")
_DTYPE = np.dtype("<u2")
_NONE = 65535  # how "no label" (-1) is stored
_CHECKSUM_BYTES = 32
_READ_BYTES = 1 << 20
_ABANDONED_S = 3600  # a shard that is being written changes with every batch of windows
_MEND = "run `cocomix labels` again, which makes it anew"
_VERSION = 1
_NAMES = {
    "data": "other token files",
    "teacher": "another teacher",
    "sae": "another SAE",
    "layer": "another block of the teacher",
    "label_topk": "another number of labels a token",
    "dtype": "a teacher in another precision",
    "seq_len": "another window length",
}


class LabelCache:
    """Labels of the windows of one token file: uint16 [n_windows, T, K] in shards of `shard_windows` windows.

    A shard is written aside and renamed, so it is complete or not there; its last 32 bytes are the SHA-256 of the
    rest. `fingerprints` (strings by the names of `_NAMES`) say what the labels were made from. Shards are
    memory-mapped, a few at a time. Nothing in memory grows with their number but, while labels are made, one byte a
    shard; what there is is found in the folder's listing, since a file system of many machines is slow to ask about
    each file.
    """

    def __init__(self, folder, meta: dict):
        self.folder, self._meta = Path(folder), meta
        self.n_windows, self.seq_len, self.label_topk = (meta[key] for key in ("n_windows", "seq_len", "label_topk"))
        self.shard_windows, self.fingerprints = meta["shard_windows"], meta["fingerprints"]
        self._map = functools.lru_cache(maxsize=64)(self._map_shard)

    def __reduce__(self):
        return LabelCache, (self.folder, self._meta)  # a worker process maps the shards itself

    @classmethod
    def create(
        cls, folder, *, n_windows: int, seq_len: int, label_topk: int, fingerprints: dict, shard_windows: int = 4096
    ) -> "LabelCache":
        """Start a cache, or go on with the one that is there. Raises `CocomixError` where that one was made from
        something else, and where the disk has no room for all labels."""
        meta = {
            "version": _VERSION, "n_windows": n_windows, "seq_len": seq_len, "label_topk": label_topk,
            "shard_windows": shard_windows, "fingerprints": dict(fingerprints),
        }
        path = Path(folder) / "meta.json"
        if path.exists():
            cache = cls.open(folder)
            cache.require(fingerprints)
            return cache
        require_space(folder, n_windows * seq_len * label_topk * 2)
        write_json(path, meta)
        return cls(folder, meta)

    @classmethod
    def open(cls, folder) -> "LabelCache":
        """Open a cache. Raises `CocomixError` where there is none or its description is damaged."""
        meta = read_json(Path(folder) / "meta.json", f"the label cache {folder}")
        if meta.get("version") != _VERSION:
            raise CocomixError(f"the label cache {folder} has version {meta.get('version')}, expected {_VERSION}")
        missing = {"n_windows", "seq_len", "label_topk", "shard_windows", "fingerprints"} - set(meta)
        if missing:
            raise CocomixError(
                f"the label cache {folder} is damaged: its meta.json lacks {', '.join(sorted(missing))}; delete the "
                "folder and run `cocomix labels` again"
            )
        return cls(folder, meta)

    def require(self, fingerprints: dict) -> None:
        """Raise `CocomixError`, naming what differs, unless the labels were made from these fingerprints."""
        differing = [_NAMES[key] for key, value in fingerprints.items() if self.fingerprints.get(key) != value]
        if differing:
            raise CocomixError(
                f"the label cache {self.folder} was made from {' and '.join(differing)}: run `cocomix labels` with "
                "this config and another labels.cache folder, or delete the old cache first"
            )

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
                whole, part = _SHARD.fullmatch(entry.name), _PART.fullmatch(entry.name)
                if (found := whole or part) and int(found[1]) < self.n_shards:
                    yield entry, int(found[1]), whole is None

    def append(self, shard: int, labels) -> None:
        """Write a whole shard: labels [windows of the shard, T, K] integers, -1 where there is none."""
        with self.writer(shard) as write:
            write(labels)

    @contextlib.contextmanager
    def writer(self, shard: int):
        """Yield a function that takes the labels of the shard's next windows, [n, T, K] integers, -1 where there is
        none. The shard appears when the block ends and all its windows have come."""
        digest, n_windows, expected = hashlib.sha256(), 0, len(self.windows_of(shard))

        def write(labels) -> None:
            nonlocal n_windows
            labels = np.asarray(labels)
            n_windows += len(labels)
            if labels.shape[1:] != (self.seq_len, self.label_topk) or n_windows > expected:
                raise ValueError(f"labels of shard {shard} have shape {list(labels.shape)}, expected "
                                 f"{[expected, self.seq_len, self.label_topk]}")
            if labels.size and (labels.min() < -1 or labels.max() >= _NONE):
                raise ValueError(f"labels range from {labels.min()} to {labels.max()}, expected -1 to {_NONE - 1}")
            stored = np.where(labels < 0, _NONE, labels).astype(_DTYPE).tobytes()
            file.write(stored)
            file.flush()  # so that other processes see that this one lives
            digest.update(stored)

        with atomic_write(self._path(shard)) as file:
            yield write
            if n_windows != expected:
                raise ValueError(f"shard {shard} got labels of {n_windows} windows, expected {expected}")
            file.write(digest.digest())

    def window(self, index: int) -> np.ndarray:
        """Labels of one window, int64 [T, K], -1 where there is none."""
        if not 0 <= index < self.n_windows:
            raise IndexError(f"window {index} of a label cache with {self.n_windows}")
        shard, row = divmod(index, self.shard_windows)
        size = self.seq_len * self.label_topk
        labels = self._map(shard).read(row * size, size).reshape(self.seq_len, self.label_topk)
        labels[labels == _NONE] = -1
        return labels

    def require_complete(self, rank: int = 0, world: int = 1) -> None:
        """Raise `CocomixError` unless every shard is there and every `world`-th one, from `rank` on, in full length."""
        missing = self.n_missing()
        if missing:
            raise CocomixError(
                f"the label cache {self.folder} is incomplete: {missing} of {self.n_shards} shards are missing; "
                "run `cocomix labels` again, it goes on where it stopped"
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
        return self.folder / f"labels-{shard:06d}.bin"

    def _n_bytes(self, shard):
        return len(self.windows_of(shard)) * self.seq_len * self.label_topk * _DTYPE.itemsize + _CHECKSUM_BYTES

    def _wrong_size(self, shard, size):
        expected = self._n_bytes(shard)
        return None if size == expected else f"has {size:,} bytes, expected {expected:,}"

    def _require_sound(self, shard, damage):
        if damage:
            raise CocomixError(f"{self._path(shard)} {damage}: {_MEND}")

    def _map_shard(self, shard):
        return MappedFile(self._path(shard), _DTYPE, self._n_bytes(shard), unit="labels", mend=_MEND)


def _is_abandoned(entry: os.DirEntry) -> bool:
    try:
        return time.time() - entry.stat().st_mtime > _ABANDONED_S
    except FileNotFoundError:  # it has just been finished
        return False


def data_fingerprints(config: Config, tokens: TokenFiles) -> dict[str, str]:
    """The part of a cache's fingerprints that the token files and the window length decide."""
    return {"data": tokens.split("train").fingerprint, "seq_len": str(config.data.seq_len)}


class LabelSource:
    """Where a training run's concept labels come from: nowhere (mixing="none"), the cache, or the teacher."""

    def __init__(self, config: Config, tokens: TokenFiles, device: torch.device):
        self.cache = self.teacher = None
        self.kind = None
        self.concept_dim = config.model.concept_dim
        if config.model.mixing == "none":
            return
        if config.labels.cache:
            self.kind, self.cache = "cached", _open_cache(config, tokens)
        else:
            from cocomix.teacher import ConceptTeacher

            self.kind, self.teacher = "online", ConceptTeacher.from_config(config.teacher, device)
            require_vocabulary(self.teacher.model, tokens)
            _require_concepts(config, self.teacher.sae.n_latents, "the SAE")

    def window(self, index: int) -> np.ndarray:
        """The cache's labels of a window, [T, K]. Raises `CocomixError` for a concept that the student lacks."""
        labels = self.cache.window(index)
        if labels.max() >= self.concept_dim:
            raise CocomixError(
                f"the label cache {self.cache.folder} names concept {labels.max()} but model.concept_dim is "
                f"{self.concept_dim}: set it to the number of the SAE's latents"
            )
        return labels

    def add_to(self, batch: dict) -> None:
        """Put `concept_labels` [B, T, K] into a batch that lacks them."""
        if self.teacher is not None:
            batch["concept_labels"] = self.teacher.labels(batch["input_ids"])


def _open_cache(config, tokens):
    """The cache of a training run, checked. The ranks share the looks at its shards, and the first one alone loads the
    teacher: hundreds of copies of it would come from the same disk."""
    rank, world = rank_and_world()
    cache = LabelCache.open(config.labels.cache)
    expected = data_fingerprints(config, tokens) | {
        "layer": str(config.teacher.layer), "label_topk": str(config.teacher.label_topk)
    }
    if rank == 0 and config.teacher.model and config.teacher.sae:
        from cocomix.teacher import ConceptTeacher

        teacher = ConceptTeacher.from_config(config.teacher, torch.device("cpu"))
        _require_concepts(config, teacher.sae.n_latents, "the SAE")
        expected |= teacher.fingerprints()
    cache.require(expected)
    cache.require_complete(rank, world)
    return cache


def _require_concepts(config, n_latents, what):
    if n_latents != config.model.concept_dim:
        raise CocomixError(f"model.concept_dim is {config.model.concept_dim} but {what} has {n_latents} latents")


def run(config: Config) -> None:
    """`cocomix labels`: fill the label cache together with the other ranks, which need no more than a common folder.

    Each rank verifies and completes every `world`-th shard, then makes what others have left over: a rank that died or
    never started. Run again, it goes on where it stopped, and makes damaged shards anew. Raises `CocomixError` where
    teacher, SAE, token files or cache do not fit.
    """
    from cocomix.teacher import ConceptTeacher

    if not config.labels.cache:
        raise CocomixError("labels.cache is not set: name the folder that the labels should go to")
    rank, world = rank_and_world()
    device = own_device()
    tokens = TokenFiles.open(config.data.folder)
    split, seq_len = tokens.split("train"), config.data.seq_len
    n_windows = split.n_windows(seq_len)
    teacher = ConceptTeacher.from_config(config.teacher, device)
    require_vocabulary(teacher.model, tokens)
    if teacher.sae.n_latents > _NONE:
        raise CocomixError(
            f"teacher.sae has {teacher.sae.n_latents} latents, but a label cache numbers at most {_NONE}: take an SAE "
            "with fewer"
        )
    cache = LabelCache.create(
        config.labels.cache, n_windows=n_windows, seq_len=seq_len, label_topk=config.teacher.label_topk,
        fingerprints=data_fingerprints(config, tokens) | teacher.fingerprints(),
        shard_windows=config.labels.shard_windows,
    )
    cache.remove_abandoned()
    n_made = 0
    with _progress(cache, rank, world) as bar:
        for shard in _shards_to_make(cache, rank, world, bar):
            with cache.writer(shard) as write:
                for part in _batches(cache.windows_of(shard)):
                    ids = torch.from_numpy(split.windows(part, seq_len)).to(device)
                    write(teacher.labels(ids).cpu())
                    bar.update(len(part) * seq_len)
            n_made += 1
    _report(cache, rank, n_made)


def _progress(cache, rank, world):
    n_windows = sum(len(cache.windows_of(shard)) for shard in range(rank, cache.n_shards, world))
    return tqdm(total=n_windows * cache.seq_len, desc="labels", unit="tok", unit_scale=True, disable=rank > 0)


def _shards_to_make(cache: LabelCache, rank: int, world: int, bar) -> Iterator[int]:
    """The missing and damaged ones of this rank's share, then what nobody else is at."""
    # By number, not by position among the missing ones: other ranks may have finished some before this one looks.
    for shard in range(rank, cache.n_shards, world):
        try:
            damage = cache.damage(shard)
        except FileNotFoundError:
            yield shard
            continue
        if damage:
            bar.write(f"labels: shard {shard} of {cache.folder} {damage}: it is made anew")
            yield shard
        else:
            bar.update(len(cache.windows_of(shard)) * cache.seq_len)
    start = rank * cache.n_shards // world  # so that ranks that are done at the same time take different ones
    while (shard := cache.unclaimed(start)) is not None:
        bar.total += len(cache.windows_of(shard)) * cache.seq_len
        yield shard


def _batches(windows: range, size: int = 32) -> Iterator[range]:
    for start in range(windows.start, windows.stop, size):
        yield range(start, min(start + size, windows.stop))


def _report(cache, rank, n_made) -> None:
    missing = cache.n_missing()
    if missing == 0 and (rank == 0 or n_made):
        print(f"labels: {cache.folder} is complete: {cache.n_windows:,} windows of {cache.seq_len} tokens")
    elif rank == 0:
        print(f"labels: {cache.folder} still lacks {missing} of {cache.n_shards} shards: other processes are at work "
              "on them; if they have died, run this again")


def require_vocabulary(model, tokens: TokenFiles) -> None:
    """Raise `CocomixError` unless the model's vocabulary covers the token files'."""
    if model.config.vocab_size < tokens.vocab_size:
        raise CocomixError(
            f"the token files in {tokens.folder} use {tokens.vocab_size} ids but the model knows "
            f"{model.config.vocab_size}: it was made for another tokenizer"
        )
