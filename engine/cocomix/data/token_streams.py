"""What token files are written from: text that is tokenized, or token files of other programs."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.core.files import sha256_of_file
from cocomix.core.model_names import without_prefix
from cocomix.data.documents import Piece, pieces, require_text
from cocomix.data.foreign_tokens import TokenSources
from cocomix.data.left_out import LeftOut
from cocomix.data.sources import Source, left_out_of, open_sources, require_few_bad
from cocomix.data.splitter import Splitter
from cocomix.data.tokenizer import load_tokenizer, train_tokenizer, vocab_size_of
from cocomix.data.tokenizing import tokenize

_OF_BOTH = ("tokenizer", "max_tokens", "val_fraction")


class Stretch(NamedTuple):
    """Consecutive tokens of a document, of which the `last` ones end it, and the side that they go to."""

    ids: np.ndarray
    last: bool
    side: str
    text_bytes: int  # 0 where there was no text


class TokenStream(ABC):
    """All documents that a config names, as tokens in order."""

    def __init__(self, config: DataConfig):
        self.config = config

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """The settings that decide what is in the token files, JSON-serialisable."""

    @abstractmethod
    def fingerprints(self) -> list[dict]:
        """What tells the sources from others, JSON-serialisable."""

    @abstractmethod
    def require_some(self) -> None:
        """Raise `CocomixError` unless there is something in every source."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The transformers tokenizer whose tokens they are."""

    @abstractmethod
    def stretches(self, tokenizer: Any, progress: Any) -> Iterator[Stretch]:
        """Everything in order; `progress` is a bar of `progress`, which is moved on."""

    @abstractmethod
    def progress(self, what: str) -> Any:
        """A progress bar over the whole of it."""

    @abstractmethod
    def require_few_bad(self) -> None:
        """Raise `CocomixError` where too much of what was read is bad."""

    @abstractmethod
    def notes(self) -> list[str]:
        """What people should know of it, once it was read."""

    @abstractmethod
    def left_out(self) -> list[LeftOut]:
        """What of the sources was not read, or not as it stands."""


class TextStream(TokenStream):
    """The documents of `data.text`."""

    def __init__(self, config: DataConfig):
        super().__init__(config)
        self._sources: list[Source] = open_sources(config)

    def settings(self) -> dict[str, Any]:
        """Those of the text, and how it is tokenized."""
        names = ("text_key", "document_separator", *_OF_BOTH)
        settings = {"text": list(self.config.text), **{name: getattr(self.config, name) for name in names}}
        if self.config.tokenizer is None:
            return {**settings, "vocab_size": self.config.vocab_size}
        return settings | _of_tokenizer(self.config.tokenizer)

    def fingerprints(self) -> list[dict]:
        """Of each source."""
        return [source.fingerprint() for source in self._sources]

    def require_some(self) -> None:
        """At least one document in each."""
        for source in self._sources:
            require_text(source)

    def tokenizer(self) -> Any:
        """The one that is named, or else one that is trained on the text."""
        if self.config.tokenizer:
            return load_tokenizer(self.config.tokenizer)
        side = Splitter(self.config.val_fraction)
        with self.progress("tokenizer") as progress:
            stream = self._checked(_shown(pieces(self._sources), progress))
            training = (piece.text for piece in stream if side(piece.document, len(piece.text)) == "train")
            return train_tokenizer(training, self.config.vocab_size)

    def stretches(self, tokenizer: Any, progress: Any) -> Iterator[Stretch]:
        """Text as it is tokenized."""
        side = Splitter(self.config.val_fraction)
        shown = _shown(pieces(self._sources), progress)
        for piece, ids in tokenize(shown, tokenizer, self.config.processes):
            yield Stretch(ids, piece.last, side(piece.document, len(piece.text)), len(piece.text.encode()))

    def progress(self, what: str) -> Any:
        """In bytes of text; of packed text and records nobody knows how many there are."""
        sizes = [source.plain_bytes for source in self._sources]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        return tqdm(desc=what, total=total, unit="B", unit_scale=True)

    def require_few_bad(self) -> None:
        """By records."""
        require_few_bad(self._sources, self.config.max_bad_share)

    def notes(self) -> list[str]:
        """What a mixture ended with."""
        ended = [source for source in self._sources if source.ended_with]
        return [f"{source.name} ends with {source.ended_with}, all of which is in it" for source in ended]

    def left_out(self) -> list[LeftOut]:
        """Of all sources."""
        return left_out_of(self._sources)

    def _checked(self, stream: Iterable[Piece]) -> Iterator[Piece]:
        yield from stream
        self.require_few_bad()


class GivenTokens(TokenStream):
    """The documents of `data.tokens`: token files that other programs made with `data.tokenizer`. Raises `CocomixError`
    where text is named too, where no tokenizer is, and for `data.max_tokens` of files that are named train and val."""

    def __init__(self, config: DataConfig):
        super().__init__(config)
        if config.text:
            raise CocomixError(
                "data.tokens and data.text are both set: set data.text=[] to take the tokens, or data.tokens=[]"
            )
        if not config.tokenizer:
            raise CocomixError(
                "data.tokens needs data.tokenizer: the folder, or hf:NAME, of the tokenizer that made them"
            )
        self._tokenizer = load_tokenizer(config.tokenizer)
        self._sources = TokenSources(config.tokens, vocab_size_of(self._tokenizer))
        if config.max_tokens and any(file.side for files in self._sources.files for file in files):
            raise CocomixError(
                "data.max_tokens would cut off validation where files are named train and val: leave it out, or take "
                "those words out of their names"
            )

    def settings(self) -> dict[str, Any]:
        """The files, and the tokenizer that made them."""
        settings = {"tokens": list(self.config.tokens), **{name: getattr(self.config, name) for name in _OF_BOTH}}
        return settings | _of_tokenizer(str(self.config.tokenizer))

    def fingerprints(self) -> list[dict]:
        """Of each entry."""
        return self._sources.fingerprints()

    def require_some(self) -> None:
        """At least one document."""
        if next(self._sources.pieces(self._tokenizer.eos_token_id), None) is None:
            raise CocomixError(f"data.tokens: there are no documents in {', '.join(self.config.tokens)}")

    def tokenizer(self) -> Any:
        """The one that is named."""
        return self._tokenizer

    def stretches(self, tokenizer: Any, progress: Any) -> Iterator[Stretch]:
        """The documents on the side that their file's name says, else by `data.val_fraction`."""
        side = Splitter(self.config.val_fraction)
        for piece in self._sources.pieces(tokenizer.eos_token_id):
            yield Stretch(piece.ids, piece.last, piece.side or side(piece.document, len(piece.ids)), 0)
            progress.update(len(piece.ids))

    def progress(self, what: str) -> Any:
        """In tokens."""
        return tqdm(desc=what, total=self._sources.n_tokens, unit="tok", unit_scale=True)

    def require_few_bad(self) -> None:
        """A bad token stops it at once."""

    def notes(self) -> list[str]:
        """What each file was taken for."""
        return [str(file) for files in self._sources.files for file in files]

    def left_out(self) -> list[LeftOut]:
        """Of all entries."""
        return [found for tally in self._sources.tallies for found in tally.left_out()]


def open_stream(config: DataConfig) -> TokenStream:
    """What the config names, opened without reading it. Raises `CocomixError` where that is nothing, or contradicts
    itself."""
    return GivenTokens(config) if config.tokens else TextStream(config)


def _of_tokenizer(name: str) -> dict[str, Any]:
    file = Path(name, "tokenizer.json")
    return {"tokenizer": without_prefix(name), "tokenizer_sha256": sha256_of_file(file) if file.is_file() else None}


def _shown(stream: Iterable[Piece], progress: Any) -> Iterator[Piece]:
    for piece in stream:
        yield piece
        progress.update(len(piece.text.encode()))
