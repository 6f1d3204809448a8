import numpy as np
import pytest

from cocomix.data.splitter import Splitter


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.5])
def test_the_split_keeps_its_share_and_never_leaves_a_side_empty(fraction):
    lengths = np.random.default_rng(0).lognormal(5, 1.5, size=5000).astype(int) + 1
    side, chars = Splitter(fraction), {"train": 0, "val": 0}
    for document, length in enumerate(lengths.tolist()):
        name = side(document, length)
        chars[name] += length
        assert document > 1 or name == ("train", "val")[document]
        # beyond the share goes at most the document that filled it, and short of it at most what came since
        assert abs(chars["val"] - fraction * sum(chars.values())) <= lengths[: document + 1].max()


def test_a_short_second_document_does_not_leave_validation_short():
    side = Splitter(0.1)
    sides = [side(document, size) for document, size in enumerate([1000, 1, 50, 500, 500])]
    assert sides == [
        "train",
        "val",
        "val",
        "val",
        "train",
    ]


def test_the_pieces_of_a_document_stay_together():
    side = Splitter(0.5)
    sides = [side(document, size) for document, size in [(0, 2), (0, 2), (1, 9), (1, 1)]]
    assert sides == [
        "train",
        "train",
        "val",
        "val",
    ]
