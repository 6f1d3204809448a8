"""Concept labels kept on disk: eight bytes a token, in shards that are whole or absent."""

import functools
import hashlib
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cocomix.config import Config
from cocomix.data import TokenFiles
from cocomix.distributed import own_device, rank_and_world
from cocomix.errors import CocomixError
from cocomix.files import atomic_write, read_json, require_space, write_json

_NONE = 65535  # how "no label" (-1) is stored
_CHECKSUM_BYTES = 32
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
    memory-mapped; nothing in memory grows with their number.
    """

    def __init__(self, folder, meta: dict):
        self.folder, self._meta = Path(folder), meta
        self.n_windows, self.seq_len, self.label_topk = (meta[key] for key in ("n_windows", "seq_len", "label_topk"))
        self.shard_windows, self.fingerprints = meta["shard_windows"], meta["fingerprints"]
        self._map = functools.lru_cache(maxsize=64)(self._open_shard)

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

    def missing_shards(self) -> list[int]:
        """Shards that are not there yet."""
        return [shard for shard in range(self.n_shards) if not self._path(shard).exists()]

    def append(self, shard: int, labels) -> None:
        """Write a whole shard: labels [windows of the shard, T, K] integers, -1 where there is none."""
        labels = np.asarray(labels)
        expected = (len(self.windows_of(shard)), self.seq_len, self.label_topk)
        if labels.shape != expected:
            raise ValueError(f"labels of shard {shard} have shape {list(labels.shape)}, expected {list(expected)}")
        if labels.size and (labels.min() < -1 or labels.max() >= _NONE):
            raise ValueError(f"labels range from {labels.min()} to {labels.max()}, expected -1 to {_NONE - 1}")
        stored = np.where(labels < 0, _NONE, labels).astype("<u2").tobytes()
        with atomic_write(self._path(shard)) as file:
            file.write(stored)
            file.write(hashlib.sha256(stored).digest())

    def window(self, index: int) -> np.ndarray:
        """Labels of one window, int64 [T, K], -1 where there is none."""
        if not 0 <= index < self.n_windows:
            raise IndexError(f"window {index} of a label cache with {self.n_windows}")
        shard, row = divmod(index, self.shard_windows)
        stored = self._map(shard)[row].astype(np.int64)
        stored[stored == _NONE] = -1
        return stored

    def require_complete(self) -> None:
        """Raise `CocomixError` unless every shard is there in full length."""
        missing = self.missing_shards()
        if missing:
            raise CocomixError(
                f"the label cache {self.folder} is incomplete: {len(missing)} of {self.n_shards} shards are missing; "
                "run `cocomix labels` again, it goes on where it stopped"
            )
        for shard in range(self.n_shards):
            self._check_size(shard)

    def verify(self) -> None:
        """Read everything once and raise `CocomixError` for a shard whose checksum does not hold."""
        self.require_complete()
        for shard in range(self.n_shards):
            content = self._path(shard).read_bytes()
            if hashlib.sha256(content[:-_CHECKSUM_BYTES]).digest() != content[-_CHECKSUM_BYTES:]:
                raise CocomixError(
                    f"{self._path(shard)} is damaged (its checksum does not hold): delete it and run `cocomix labels` "
                    "again"
                )

    def _path(self, shard):
        return self.folder / f"labels-{shard:06d}.bin"

    def _check_size(self, shard):
        expected = len(self.windows_of(shard)) * self.seq_len * self.label_topk * 2 + _CHECKSUM_BYTES
        size = self._path(shard).stat().st_size
        if size != expected:
            raise CocomixError(
                f"{self._path(shard)} has {size} bytes, expected {expected}: delete it and run `cocomix labels` again"
            )

    def _open_shard(self, shard):
        self._check_size(shard)
        shape = (len(self.windows_of(shard)), self.seq_len, self.label_topk)
        return np.memmap(self._path(shard), dtype="<u2", mode="r", shape=shape)


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
    cache = LabelCache.open(config.labels.cache)
    expected = data_fingerprints(config, tokens) | {
        "layer": str(config.teacher.layer), "label_topk": str(config.teacher.label_topk)
    }
    if config.teacher.model and config.teacher.sae:
        from cocomix.teacher import ConceptTeacher

        teacher = ConceptTeacher.from_config(config.teacher, torch.device("cpu"))
        _require_concepts(config, teacher.sae.n_latents, "the SAE")
        expected |= teacher.fingerprints()
    cache.require(expected)
    cache.require_complete()
    return cache


def _require_concepts(config, n_latents, what):
    if n_latents != config.model.concept_dim:
        raise CocomixError(f"model.concept_dim is {config.model.concept_dim} but {what} has {n_latents} latents")


def run(config: Config) -> None:
    """`cocomix labels`: fill the label cache, each rank its shards; run again, it goes on where it stopped.

    Raises `CocomixError` where teacher, SAE, token files or cache do not fit.
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
    cache = LabelCache.create(
        config.labels.cache, n_windows=n_windows, seq_len=seq_len, label_topk=config.teacher.label_topk,
        fingerprints=data_fingerprints(config, tokens) | teacher.fingerprints(),
        shard_windows=config.labels.shard_windows,
    )
    # By number, not by position among the missing ones: other ranks may have finished some before this one looks.
    missing = [shard for shard in cache.missing_shards() if shard % world == rank]
    with tqdm(total=sum(len(cache.windows_of(s)) for s in missing) * seq_len, desc="labels", unit="tok",
              unit_scale=True, disable=rank > 0 or not missing) as bar:
        for shard in missing:
            cache.append(shard, _label_windows(teacher, split, cache.windows_of(shard), seq_len, device, bar))
    if not cache.missing_shards():
        cache.verify()
        if rank == 0:
            print(f"labels: {cache.folder} is complete: {n_windows:,} windows of {seq_len} tokens")


def require_vocabulary(model, tokens: TokenFiles) -> None:
    """Raise `CocomixError` unless the model's vocabulary covers the token files'."""
    if model.config.vocab_size < tokens.vocab_size:
        raise CocomixError(
            f"the token files in {tokens.folder} use {tokens.vocab_size} ids but the model knows "
            f"{model.config.vocab_size}: it was made for another tokenizer"
        )


def _label_windows(teacher, split, windows: range, seq_len: int, device, bar, batch: int = 32):
    labels = []
    for start in range(windows.start, windows.stop, batch):
        part = range(start, min(start + batch, windows.stop))
        ids = torch.from_numpy(np.stack([split.window(i, seq_len) for i in part])).to(device)
        labels.append(teacher.labels(ids).cpu().numpy())
        bar.update(len(part) * seq_len)
    return np.concatenate(labels)
