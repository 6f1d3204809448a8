"""Several documents in one text, with something between them."""

from collections.abc import Iterable, Iterator


def split_documents(texts: Iterable[str], separator: str) -> Iterator[Iterator[str]]:
    """The documents of a text that comes in parts, in parts themselves, one after the other: what is not read of one is
    gone when the next is asked for. The separator goes, and one end of line on either side of it; so does what follows
    the last one, where it is nothing.
    """
    reader = _Reader(texts, separator)
    while reader.begin():
        document = reader.document()
        yield document
        for _ in document:
            pass


class _Reader:
    """Holds no more of the text than one part and what may be the start of a separator."""

    def __init__(self, texts: Iterable[str], separator: str):
        self._texts, self._separator = iter(texts), separator
        self._held, self._is_first = "", True

    def begin(self) -> bool:
        """Whether a document follows."""
        if self._is_first:
            self._is_first = False
            return True
        while len(self._held) < 2 and self._read():  # as much as an end of line may have
            pass
        self._held = self._held.removeprefix("\r\n" if self._held.startswith("\r") else "\n")
        return bool(self._held) or self._read()

    def document(self) -> Iterator[str]:
        """The text up to the next separator or the end."""
        kept = len(self._separator) + 1  # behind which neither the separator nor an end of line before it has begun
        while (found := self._held.find(self._separator)) < 0:
            yield self._held[:-kept]
            self._held = self._held[-kept:]
            if not self._read():
                yield self._held
                self._held = ""
                return
        text, self._held = self._held[:found], self._held[found + len(self._separator) :]
        yield text.removesuffix("\r\n" if text.endswith("\r\n") else "\n")

    def _read(self) -> bool:
        """Hold the next part that is not empty; whether there is one."""
        for text in self._texts:
            if text:
                self._held += text
                return True
        return False
