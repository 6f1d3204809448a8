"""Which documents train and which validate."""

from cocomix.data.token_files import SPLITS


class Splitter:
    """Sends documents to "train" or "val" as they stream by.

    A document validates where validation holds less than its share of the text before it, so the share is kept from
    the first documents on, however long they are; the first one trains. A pure function of the documents before.
    """

    def __init__(self, val_fraction: float):
        self._fraction, self._document, self._side = val_fraction, -1, "train"
        self._sizes: dict[str, int] = dict.fromkeys(SPLITS, 0)

    def __call__(self, document: int, size: int) -> str:
        """The side of a stretch of a document, which has `size` characters or tokens; stretches come in order."""
        if document != self._document:
            self._document = document
            self._side = "val" if self._sizes["val"] < self._fraction * sum(self._sizes.values()) else "train"
        self._sizes[self._side] += size
        return self._side
