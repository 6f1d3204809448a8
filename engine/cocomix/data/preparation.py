"""`cocomix data`: text, or tokens of other programs -> tokenizer and token files."""

import contextlib
import dataclasses
from pathlib import Path
from typing import cast

import numpy as np

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.core.files import (
    atomic_folder,
    atomic_write,
    require_space,
    sweep_leftovers,
    write_own_json,
)
from cocomix.core.locks import only_writer
from cocomix.core.manifest import require_sound, write_manifest
from cocomix.core.origin import differences
from cocomix.core.output import note_once
from cocomix.data.left_out import BAD_RECORD, say
from cocomix.data.shuffling import shuffle_documents
from cocomix.data.sources import FORMATS_READ
from cocomix.data.token_files import FORMAT, SPLITS, SplitRecord, TokenFiles, TokenMeta, describe_split, scan
from cocomix.data.token_streams import TokenStream, open_stream
from cocomix.data.tokenizer import token_dtype, vocab_size_of

_TOKENIZER_ROOM_BYTES = 32 << 20


def prepare(config: DataConfig) -> "TokenFiles":
    """Make `config.folder`: train.bin, val.bin, the checksums of their blocks, tokenizer/ and, last, meta.json.

    Where the folder was made from the same text and settings, reads it through and says so. Raises `CocomixError` when
    it was made from others or is damaged, and for missing, empty or unreadable text, an unsuitable tokenizer and a full
    disk.
    """
    folder = Path(config.folder)
    stream = open_stream(config)
    made_from = {"settings": stream.settings() | _order(config), "sources": stream.fingerprints()}
    if (folder / "meta.json").exists():
        return _up_to_date(folder, config, made_from)
    stream.require_some()
    with only_writer(folder, "cocomix data"):
        if (folder / "meta.json").exists():  # another process has made it meanwhile
            return _up_to_date(folder, config, made_from)
        return _make(folder, config, stream, made_from)


def _up_to_date(folder: Path, config: DataConfig, made_from: dict) -> "TokenFiles":
    files = TokenFiles.open(folder)
    _require_same(files, made_from)
    _require_bad_records_allowed(files, config)
    _require_sound(files)
    if files.meta.left_out is None:
        note_once(f"{folder} was made by an earlier version, which did not say what it left out of the text")
    say(files.meta.left_out or [])
    print(f"{folder} is up to date: {_sizes(files)}")
    return files


def _make(folder: Path, config: DataConfig, stream: TokenStream, made_from: dict) -> "TokenFiles":
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CocomixError(f"data.folder: {folder} cannot be made: {error}") from None
    sweep_leftovers(folder, of_this_process=True)  # one before it, which was interrupted
    tokenizer = stream.tokenizer()
    vocab_size = vocab_size_of(tokenizer)
    splits = _write_token_files(folder, config, stream, tokenizer)
    for note in stream.notes():
        print(note)
    left_out = stream.left_out()
    say(left_out)
    _save_tokenizer(tokenizer, config.tokenizer, folder / "tokenizer")
    meta = TokenMeta(
        format=FORMAT,
        dtype=token_dtype(vocab_size).name,
        vocab_size=vocab_size,
        eot_id=cast(int, tokenizer.eos_token_id),
        splits=splits,
        val_unigram_perplexity=_unigram_perplexity(folder, splits, vocab_size),
        left_out=left_out,
        **made_from,
    )
    write_own_json(folder / "meta.json", dataclasses.asdict(meta))
    return TokenFiles.open(folder)


def verify(config: DataConfig) -> None:
    """Read the token files in `config.folder` through and print that they are as they were made.

    Raises `CocomixError`, naming the file, where they are missing or damaged or have changed.
    """
    files = TokenFiles.open(config.folder)
    _require_sound(files)
    print(f"{files.folder} is as it was made: {_sizes(files)}")


def _require_sound(files: "TokenFiles") -> None:
    for name in SPLITS:
        files.split(name).verify()
    require_sound(files.folder / "tokenizer")


def _sizes(files: "TokenFiles") -> str:
    return " and ".join(f"{files.split(name).n_tokens:,} {name}" for name in SPLITS) + " tokens"


def _order(config: DataConfig) -> dict:
    """The settings of the documents' order, where it is not that of the text."""
    return {name: getattr(config, name) for name in ("shuffle_documents", "shuffle_seed") if config.shuffle_documents}


def _require_same(files: "TokenFiles", made_from: dict) -> None:
    was, now = files.meta.settings, made_from["settings"]
    changes = [f"data.{found.name} was {found.stored!r} and is {found.present!r}" for found in differences(was, now)]
    if all(was.get(name) == now.get(name) for name in ("text", "tokens")):
        for old, new in zip(files.meta.sources, made_from["sources"], strict=False):
            if old == new:
                continue
            if old == {name: value for name, value in new.items() if name != FORMATS_READ}:
                changes.append(f"more kinds of files are read now than were then in {new['source']}")
            else:
                changes.append(f"the text changed: {_size(old)} then, {_size(new)} now (sizes, names and times count)")
    if changes:
        raise CocomixError(
            f"{files.folder} was made from something else: {'; '.join(changes)}. Set data.folder to another folder, or "
            f"delete {files.folder} to make it anew"
        )


def _require_bad_records_allowed(files: "TokenFiles", config: DataConfig) -> None:
    for found in files.meta.left_out or []:
        if found.reason == BAD_RECORD and config.on_bad_record == "stop":
            raise CocomixError(
                f"{files.folder} was made without {found} of {found.source}: set data.on_bad_record=skip to leave them "
                f"out, or mend them, delete {files.folder} and make it anew"
            )


def _size(fingerprint: dict) -> str:
    if "files" not in fingerprint:
        return fingerprint["source"]
    return f"{fingerprint['source']} with {fingerprint['files']:,} files of {fingerprint['bytes']:,} bytes"


def _save_tokenizer(tokenizer, origin: str | None, folder: Path) -> None:
    if origin is not None and Path(origin).resolve() == folder.resolve():
        return
    require_space(folder, _TOKENIZER_ROOM_BYTES)  # the tokenizer's own writer does not raise OSError on a full disk
    with atomic_folder(folder) as aside:
        tokenizer.save_pretrained(aside)
        write_manifest(aside)


def _write_token_files(folder: Path, config: DataConfig, stream: TokenStream, tokenizer) -> dict[str, SplitRecord]:
    dtype = token_dtype(vocab_size_of(tokenizer))
    counts = {name: {"tokens": 0, "documents": 0, "text_bytes": 0} for name in SPLITS}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(atomic_write(folder / f"{name}.bin")) for name in SPLITS}
        progress = stack.enter_context(stream.progress("tokens"))
        for stretch in stream.stretches(tokenizer, progress):
            files[stretch.side].write(stretch.ids.tobytes())
            count = counts[stretch.side]
            count["tokens"] += len(stretch.ids)
            count["documents"] += stretch.last
            count["text_bytes"] += stretch.text_bytes
            total = sum(count["tokens"] for count in counts.values())
            progress.set_postfix_str(f"{total / 1e6:.1f}M tokens", refresh=False)
            if stretch.last and 0 < config.max_tokens <= total and counts["val"]["documents"]:
                break
        stream.require_few_bad()
        if counts["val"]["documents"] == 0:
            _share_one_document(files, counts, config.val_fraction, dtype)
    if config.shuffle_documents:
        shuffle_documents(folder / "train.bin", dtype, tokenizer.eos_token_id, config.shuffle_seed)
    return {name: describe_split(folder, name, counts[name], dtype) for name in SPLITS}


def _share_one_document(files: dict, counts: dict, val_fraction: float, dtype: np.dtype) -> None:
    """Move the tail of the only document from the training to the validation file; bytes go with the tokens."""
    train, val = counts["train"], counts["val"]
    total = train["tokens"]
    kept = min(max(round(total * (1 - val_fraction)), 1), total - 1)
    files["train"].flush()
    for tokens in scan(files["train"].name, dtype, kept):
        files["val"].write(tokens.tobytes())
    files["train"].truncate(kept * dtype.itemsize)
    val_bytes = round(train["text_bytes"] * (total - kept) / total)
    val.update(tokens=total - kept, documents=1, text_bytes=val_bytes)
    train.update(tokens=kept, text_bytes=train["text_bytes"] - val_bytes)


def _unigram_perplexity(folder: Path, splits: dict[str, SplitRecord], vocab_size: int) -> float:
    """Perplexity of the validation tokens under the training tokens' frequencies (each id counted once more): what a
    model reaches that knows frequencies and nothing else."""
    train, val = (_frequencies(folder / splits[name].file, vocab_size) for name in SPLITS)
    log_p = np.log((train + 1) / (train.sum() + vocab_size))
    return float(np.exp(-(val * log_p).sum() / val.sum()))


def _frequencies(path: Path, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in scan(path, token_dtype(vocab_size)):
        counts += np.bincount(tokens, minlength=vocab_size)
    return counts
