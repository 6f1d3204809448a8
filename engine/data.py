"""Text -> token files -> resumable batches.

Token files are flat little-endian uint16, every document followed by the end-of-text token. Training reads them in
non-overlapping windows of T tokens, in an order that is a pure function of (seed, position): resuming a run needs to
know its step and nothing else.
"""

import contextlib
import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from cocomix.config import DataConfig
from cocomix.errors import CocomixError
from cocomix.files import atomic_folder, atomic_write, read_json, require_space, sha256_of_file, write_json
from cocomix.mapped_file import MappedFile
from cocomix.sources import Source, open_sources
from cocomix.text import (
    TOKEN_DTYPE,
    Piece,
    load_tokenizer,
    pieces,
    require_text,
    tokenize,
    train_tokenizer,
    vocab_size_of,
)

FORMAT = 1
SPLITS = ("train", "val")
_TOKENIZER_ROOM_BYTES = 32 << 20
_SCAN_TOKENS = 1 << 24


def prepare(config: DataConfig) -> "TokenFiles":
    """Make `config.folder`: train.bin, val.bin, tokenizer/ and, last, meta.json.

    Does nothing but say so when the folder was made from the same text and settings. Raises `CocomixError` when it was
    made from others, and for missing, empty or unreadable text, an unsuitable tokenizer and a full disk.
    """
    folder = Path(config.folder)
    sources = open_sources(config)
    made_from = {"settings": _settings(config), "sources": [source.fingerprint() for source in sources]}
    if (folder / "meta.json").exists():
        files = TokenFiles.open(folder)
        _require_same(files, made_from)
        sizes = [f"{files.split(name).n_tokens:,} {name}" for name in SPLITS]
        print(f"{folder} is up to date: {' and '.join(sizes)} tokens")
        return files
    for source in sources:
        require_text(source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CocomixError(f"data.folder: {folder} cannot be made: {error}") from None
    _remove_leftovers(folder)
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else _train_tokenizer(config, sources)
    vocab_size = vocab_size_of(tokenizer)
    splits = _write_token_files(folder, config, sources, tokenizer)
    for source in sources:
        if source.ended_with:
            print(f"{source.name} ends with {source.ended_with}, all of which is in it")
    _save_tokenizer(tokenizer, config.tokenizer, folder / "tokenizer")
    write_json(folder / "meta.json", {
        "format": FORMAT, "dtype": "uint16", "vocab_size": vocab_size, "eot_id": tokenizer.eos_token_id,
        "splits": splits, "val_unigram_perplexity": _unigram_perplexity(folder, splits, vocab_size), **made_from,
    })
    return TokenFiles.open(folder)


def _settings(config: DataConfig) -> dict:
    names = ("text", "text_key", "tokenizer", "max_tokens", "val_fraction")
    settings = {name: getattr(config, name) for name in names}
    settings["text"] = list(config.text)
    if config.tokenizer is None:
        return {**settings, "vocab_size": config.vocab_size}
    file = Path(config.tokenizer, "tokenizer.json")
    return {**settings, "tokenizer_sha256": sha256_of_file(file) if file.is_file() else None}


def _require_same(files: "TokenFiles", made_from: dict) -> None:
    was, now = files.meta["settings"], made_from["settings"]
    changes = [f"data.{name} was {was.get(name)!r} and is {now.get(name)!r}"
               for name in sorted({*was, *now}) if was.get(name) != now.get(name)]
    if was.get("text") == now["text"]:
        for old, new in zip(files.meta["sources"], made_from["sources"], strict=False):
            if old != new:
                changes.append(f"the text changed: {_size(old)} then, {_size(new)} now (sizes, names and times count)")
    if changes:
        raise CocomixError(
            f"{files.folder} was made from something else: {'; '.join(changes)}. Set data.folder to another folder, or "
            f"delete {files.folder} to make it anew"
        )


def _size(fingerprint: dict) -> str:
    if "files" not in fingerprint:
        return fingerprint["source"]
    return f"{fingerprint['source']} with {fingerprint['files']:,} files of {fingerprint['bytes']:,} bytes"


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed run of this program left half-written, and nothing that a living one is writing."""
    for part in folder.glob(".*.part"):
        pid = part.name.split(".")[-2]
        if pid == str(os.getpid()) or (pid.isdecimal() and not _is_running(int(pid))):
            shutil.rmtree(part) if part.is_dir() else part.unlink()


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _train_tokenizer(config: DataConfig, sources: list[Source]):
    side = Splitter(config.val_fraction)
    with _progress(sources, "tokenizer") as progress:
        return train_tokenizer(
            (piece.text for piece in _shown(pieces(sources), progress) if side(piece) == "train"), config.vocab_size)


def _save_tokenizer(tokenizer, origin: str | None, folder: Path) -> None:
    if origin is not None and Path(origin).resolve() == folder.resolve():
        return
    require_space(folder, _TOKENIZER_ROOM_BYTES)  # the tokenizer's own writer does not raise OSError on a full disk
    with atomic_folder(folder) as aside:
        tokenizer.save_pretrained(aside)


class Splitter:
    """Sends documents to "train" or "val" as they stream by.

    A document validates where validation holds less than its share of the text before it, so the share is kept from
    the first documents on, however long they are; the first one trains. A pure function of the documents before.
    """

    def __init__(self, val_fraction: float):
        self._fraction, self._document, self._side = val_fraction, -1, "train"
        self._chars = dict.fromkeys(SPLITS, 0)

    def __call__(self, piece: Piece) -> str:
        """The side of a piece's document; pieces come in order."""
        if piece.document != self._document:
            self._document = piece.document
            self._side = "val" if self._chars["val"] < self._fraction * sum(self._chars.values()) else "train"
        self._chars[self._side] += len(piece.text)
        return self._side


@contextlib.contextmanager
def _progress(sources: list[Source], what: str):
    sizes = [source.plain_bytes for source in sources]
    total = None if None in sizes else sum(sizes)
    with tqdm(desc=what, total=total, unit="B", unit_scale=True) as progress:
        yield progress


def _shown(stream: Iterable[Piece], progress) -> Iterator[Piece]:
    for piece in stream:
        yield piece
        progress.update(len(piece.text.encode()))


def _write_token_files(folder: Path, config: DataConfig, sources: list[Source], tokenizer) -> dict:
    side = Splitter(config.val_fraction)
    counts = {name: {"tokens": 0, "documents": 0, "text_bytes": 0} for name in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(atomic_write(folder / f"{name}.bin")) for name in SPLITS}
        progress = stack.enter_context(_progress(sources, "tokens"))
        for piece, ids in tokenize(_shown(pieces(sources), progress), tokenizer, config.processes):
            name = side(piece)
            files[name].write(ids.tobytes())
            count = counts[name]
            count["tokens"] += len(ids)
            count["documents"] += piece.last
            count["text_bytes"] += len(piece.text.encode())
            total = sum(count["tokens"] for count in counts.values())
            progress.set_postfix_str(f"{total / 1e6:.1f}M tokens", refresh=False)
            if piece.last and 0 < config.max_tokens <= total and counts["val"]["documents"]:
                break
        if counts["val"]["documents"] == 0:
            _share_one_document(files, counts, config.val_fraction)
    return {name: {"file": f"{name}.bin", **counts[name], "sha256": sha256_of_file(folder / f"{name}.bin")}
            for name in SPLITS}


def _share_one_document(files: dict, counts: dict, val_fraction: float) -> None:
    """Move the tail of the only document from the training to the validation file; bytes go with the tokens."""
    train, val = counts["train"], counts["val"]
    total = train["tokens"]
    kept = min(max(round(total * (1 - val_fraction)), 1), total - 1)
    files["train"].flush()
    for tokens in _scan(files["train"].name, kept):
        files["val"].write(tokens.tobytes())
    files["train"].truncate(kept * TOKEN_DTYPE.itemsize)
    val_bytes = round(train["text_bytes"] * (total - kept) / total)
    val.update(tokens=total - kept, documents=1, text_bytes=val_bytes)
    train.update(tokens=kept, text_bytes=train["text_bytes"] - val_bytes)


def _unigram_perplexity(folder: Path, splits: dict, vocab_size: int) -> float:
    """Perplexity of the validation tokens under the training tokens' frequencies (each id counted once more): what a
    model reaches that knows frequencies and nothing else."""
    train, val = (_frequencies(folder / splits[name]["file"], vocab_size) for name in SPLITS)
    log_p = np.log((train + 1) / (train.sum() + vocab_size))
    return float(np.exp(-(val * log_p).sum() / val.sum()))


def _frequencies(path: Path, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in _scan(path):
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts


def _scan(path, start: int = 0) -> Iterator[np.ndarray]:
    """The tokens of a file from number `start` on, in parts of at most `_SCAN_TOKENS`."""
    with open(path, "rb") as file:
        file.seek(start * TOKEN_DTYPE.itemsize)
        while len(tokens := np.fromfile(file, TOKEN_DTYPE, _SCAN_TOKENS)):
            yield tokens


class TokenFiles:
    """A folder that `prepare` made. `meta` is its meta.json, `eot_id` the id of the end-of-text token."""

    def __init__(self, folder: Path, meta: dict):
        self.folder, self.meta = folder, meta
        self.vocab_size: int = meta["vocab_size"]
        self.eot_id: int = meta["eot_id"]

    @classmethod
    def open(cls, folder) -> "TokenFiles":
        """Read meta.json. Raises `CocomixError` when it is missing, broken or of another format."""
        folder = Path(folder)
        meta = read_json(folder / "meta.json", "the description of the token files (`cocomix data` makes them)")
        if meta.get("format") != FORMAT:
            raise CocomixError(
                f"{folder / 'meta.json'} has format {meta.get('format')!r}, this version of cocomix reads {FORMAT}: "
                f"{_make_again(folder)}"
            )
        missing = {"vocab_size", "eot_id", "splits", "val_unigram_perplexity", "settings", "sources"} - set(meta)
        if missing:
            raise CocomixError(f"{folder / 'meta.json'} lacks {', '.join(sorted(missing))}: {_make_again(folder)}")
        return cls(folder, meta)

    def tokenizer(self):
        """The transformers tokenizer that made the token files."""
        return load_tokenizer(str(self.folder / "tokenizer"))

    def split(self, name: str) -> "TokenSplit":
        """Open "train" or "val"; see `TokenSplit` for the errors."""
        entry = self.meta["splits"][name]
        return TokenSplit(self.folder / entry["file"], entry["tokens"], self.vocab_size, entry["sha256"])


class TokenSplit:
    """A memory-mapped token file, read in non-overlapping windows. Pickles as a path, not as its contents.

    `fingerprint` is the SHA-256 that meta.json records; opening reads none of the tokens. Raises `CocomixError` when
    the file is missing, empty or not as long as `n_tokens` says.
    """

    def __init__(self, path, n_tokens: int, vocab_size: int, fingerprint: str):
        self.path, self.n_tokens, self.vocab_size, self.fingerprint = Path(path), n_tokens, vocab_size, fingerprint
        self._file = MappedFile(self.path, TOKEN_DTYPE, n_tokens * TOKEN_DTYPE.itemsize, unit="tokens",
                                mend=_make_again(self.path.parent))
        self.tokens = self._file.array

    def __reduce__(self):
        return TokenSplit, (self.path, self.n_tokens, self.vocab_size, self.fingerprint)

    def n_windows(self, seq_len: int) -> int:
        """Whole windows of `seq_len` tokens; what is left over at the end is never read. At least 1, or an error."""
        if self.n_tokens < seq_len:
            raise CocomixError(
                f"{self.path} has {self.n_tokens:,} tokens, fewer than one window of data.seq_len={seq_len}: "
                "give more text or lower data.seq_len"
            )
        return self.n_tokens // seq_len

    def window(self, index: int, seq_len: int) -> np.ndarray:
        """Tokens `index * seq_len` and the `seq_len - 1` after it, int64 [seq_len].

        Raises `CocomixError` for an id beyond the vocabulary.
        """
        return self.windows(range(index, index + 1), seq_len)[0]

    def windows(self, indices: range, seq_len: int) -> np.ndarray:
        """Consecutive windows, read in one go: int64 [len(indices), seq_len]; see `window`."""
        if not 0 <= indices.start < indices.stop <= self.n_windows(seq_len):
            raise IndexError(f"windows {indices.start} to {indices.stop - 1} of {self.n_windows(seq_len)}")
        start = indices.start * seq_len
        ids = self._file.read(start, len(indices) * seq_len)
        self._require_known(ids, start)
        return ids.reshape(len(indices), seq_len)

    def verify(self) -> None:
        """Read the whole file. Raises `CocomixError` for an id beyond the vocabulary or another SHA-256."""
        digest, start = hashlib.sha256(), 0
        for tokens in _scan(self.path):
            self._require_known(tokens, start)
            digest.update(tokens)
            start += len(tokens)
        if digest.hexdigest() != self.fingerprint:
            raise CocomixError(
                f"{self.path} has changed since it was made: its SHA-256 is {digest.hexdigest()}, meta.json says "
                f"{self.fingerprint}: {_make_again(self.path.parent)}"
            )

    def _require_known(self, ids: np.ndarray, start: int) -> None:
        if ids.max() >= self.vocab_size:
            position = int(np.argmax(ids >= self.vocab_size))
            raise CocomixError(
                f"{self.path}: token {start + position} has id {ids[position]}, but the vocabulary has "
                f"{self.vocab_size} ids: {_make_again(self.path.parent)}"
            )


def _make_again(folder: Path) -> str:
    return f"delete {folder} and run `cocomix data` again"


class WindowOrder:
    """The order in which windows are read, in O(1) memory; a pure function of (seed, position).

    Position p lies in epoch p // n_windows, and every epoch is its own pseudo-random permutation: a Feistel network
    over Z_a x Z_b with modular addition (Black and Rogaway 2002), where a * b is just above n_windows, and cycle
    walking for the few values beyond it.
    """

    _ROUNDS = 8

    def __init__(self, n_windows: int, seed: int):
        if n_windows < 1:
            raise ValueError(f"n_windows must be positive, not {n_windows}")
        self.n_windows, self.seed = int(n_windows), int(seed)
        rows = math.isqrt(self.n_windows - 1) + 1
        self._rows, self._columns = np.uint64(rows), np.uint64(-(-self.n_windows // rows))

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Window indices, int64, of positions >= 0, int64 of any shape."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise IndexError("positions must not be negative")
        epochs, windows = np.divmod(np.atleast_1d(positions), self.n_windows)
        seed = np.array([self.seed % 2**64], dtype=np.uint64)
        keys = _mix(_mix(seed) + epochs.astype(np.uint64))
        windows = self._permute(windows.astype(np.uint64), keys)
        while (beyond := windows >= self.n_windows).any():
            windows[beyond] = self._permute(windows[beyond], keys[beyond])
        return windows.astype(np.int64).reshape(positions.shape)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        row, column = np.divmod(values, self._columns)
        for number in range(self._ROUNDS):
            keys = _mix(keys)
            if number % 2 == 0:
                row = (row + _mix(keys ^ column) % self._rows) % self._rows
            else:
                column = (column + _mix(keys ^ row) % self._columns) % self._columns
        return row * self._columns + column


def _mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 step: uint64 to uint64, every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def step_windows(order: WindowOrder, step: int, global_batch: int) -> np.ndarray:
    """Windows of optimizer step `step` (0-based) over all ranks, int64 [global_batch]."""
    return order[np.arange(step * global_batch, (step + 1) * global_batch)]


class WindowDataset(Dataset):
    """Windows of a split as tensors: `input_ids` int64 [T] and what `supervision` has for them.

    `supervision` is anything with `.window(index)`, which returns arrays [T, ...] by the names of a batch's entries.
    """

    def __init__(self, split: TokenSplit, seq_len: int, supervision=None):
        self.split, self.seq_len, self.supervision = split, seq_len, supervision
        self._length = split.n_windows(seq_len)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {"input_ids": torch.from_numpy(self.split.window(index, self.seq_len))}
        if self.supervision is not None:
            item |= {name: torch.from_numpy(array) for name, array in self.supervision.window(index).items()}
        return item


class MicroBatchSampler(Sampler[list[int]]):
    """Window indices of one rank's micro batches, from `first_step` up to `total_steps`.

    The windows of a step are laid out as [accumulation rounds, ranks, micro_batch], so what a step learns from does
    not depend on how many ranks share it. Raises `CocomixError` when that does not divide `global_batch`.
    """

    def __init__(self, order: WindowOrder, global_batch: int, micro_batch: int, rank: int, world_size: int,
                 first_step: int, total_steps: int):
        if global_batch % (micro_batch * world_size):
            raise CocomixError(
                f"train.global_batch ({global_batch}) must be a multiple of train.micro_batch ({micro_batch}) x "
                f"{world_size} ranks"
            )
        self.order, self.global_batch, self.micro_batch = order, global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.first_step, self.total_steps = first_step, total_steps

    def __len__(self) -> int:
        rounds = self.global_batch // (self.micro_batch * self.world_size)
        return max(0, self.total_steps - self.first_step) * rounds

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.total_steps):
            windows = step_windows(self.order, step, self.global_batch)
            for micro in windows.reshape(-1, self.world_size, self.micro_batch)[:, self.rank]:
                yield micro.tolist()
