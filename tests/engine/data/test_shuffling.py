from collections import Counter

import numpy as np
import pytest
from data_helpers import story

from cocomix.core.errors import CocomixError
from cocomix.data import shuffling, token_files
from cocomix.data.preparation import prepare
from cocomix.data.shuffling import shuffle_documents
from cocomix.data.token_files import SPLITS, TokenFiles

NARROW, WIDE = np.dtype("<u2"), np.dtype("<u4")


def documents(n: int) -> list[list[int]]:
    random = np.random.default_rng(n)
    return [random.integers(1, 300, size=length).tolist() for length in random.integers(0, 40, size=n)]


def write(path, texts, dtype=NARROW, tail=()):
    np.array([*(token for text in texts for token in [*text, 0]), *tail], dtype).tofile(path)
    return path


def read(path, dtype=NARROW) -> list[list[int]]:
    ids = np.fromfile(path, dtype)
    parts = np.split(ids, np.flatnonzero(ids == 0) + 1)
    return [part.tolist() for part in parts if len(part)]


def shuffled(path, texts, seed=0, dtype=NARROW, tail=()) -> list[list[int]]:
    shuffle_documents(write(path, texts, dtype, tail), dtype, 0, seed)
    assert list(path.parent.iterdir()) == [path]
    return read(path, dtype)


@pytest.mark.parametrize("dtype", [NARROW, WIDE])
@pytest.mark.parametrize("bucket_bytes, scanned", [(1 << 26, 1 << 24), (500, 7), (1, 1 << 24)])
def test_the_same_documents_come_out_in_another_order(tmp_path, monkeypatch, dtype, bucket_bytes, scanned):
    monkeypatch.setattr(shuffling, "_BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(token_files, "_SCAN_TOKENS", scanned)
    texts = documents(200)
    before = [[*text, 0] for text in texts]
    found = shuffled(tmp_path / "a.bin", texts, dtype=dtype)
    assert sorted(found) == sorted(before) and found != before
    assert found == shuffled(tmp_path / "a.bin", texts, dtype=dtype)
    assert found != shuffled(tmp_path / "a.bin", texts, seed=-1, dtype=dtype)
    monkeypatch.setattr(token_files, "_SCAN_TOKENS", 13)
    assert found == shuffled(tmp_path / "a.bin", texts, dtype=dtype), "how much is read at a time changes nothing"


@pytest.mark.parametrize("bucket_bytes", [1 << 26, 4])
def test_every_order_is_equally_likely(tmp_path, monkeypatch, bucket_bytes):
    monkeypatch.setattr(shuffling, "_BUCKET_BYTES", bucket_bytes)
    runs = 1200
    found = Counter(str(shuffled(tmp_path / "a.bin", [[1], [2], [3]], seed=seed)) for seed in range(runs))
    assert len(found) == 6
    chi_squared = sum((count - runs / 6) ** 2 / (runs / 6) for count in found.values())
    assert chi_squared < 20.5  # one of 1,000 such experiments with five degrees of freedom exceeds that


def test_what_has_no_end_stays_last(tmp_path, monkeypatch):
    monkeypatch.setattr(token_files, "_SCAN_TOKENS", 4)
    assert shuffled(tmp_path / "a.bin", documents(20), tail=[7, 8, 9, 7, 8, 9])[-1] == [7, 8, 9, 7, 8, 9]
    assert shuffled(tmp_path / "a.bin", [], tail=[7, 8]) == [[7, 8]]


def test_training_documents_are_shuffled_and_validation_stays(config, tmp_path):
    sorted_files = prepare(config)
    config.folder, config.shuffle_documents, config.shuffle_seed = str(tmp_path / "shuffled"), True, 3
    files = prepare(config)
    before, after = (read(made.folder / "train.bin") for made in (sorted_files, files))
    assert before != after and sorted(before) == sorted(after)
    assert sorted_files.split("val").fingerprint == files.split("val").fingerprint
    for name in SPLITS:
        files.split(name).verify()
    assert files.meta.splits["train"].documents == sorted_files.meta.splits["train"].documents
    assert prepare(config).meta == files.meta
    config.shuffle_seed = 4
    with pytest.raises(CocomixError, match="data.shuffle_seed was 3 and is 4"):
        prepare(config)
    config.shuffle_documents = False
    with pytest.raises(CocomixError, match="data.shuffle_documents was True and is None"):
        prepare(config)
    assert "shuffle_seed" not in TokenFiles.open(sorted_files.folder).meta.settings  # as earlier versions wrote it


def test_one_document_alone_keeps_its_two_parts(config, tmp_path):
    (tmp_path / "one.txt").write_text(story(3) * 20, encoding="utf-8")
    config.text, config.shuffle_documents = [str(tmp_path / "one.txt")], True
    shuffled_files = prepare(config)
    config.folder, config.shuffle_documents = str(tmp_path / "plain"), False
    plain = prepare(config)
    assert [plain.split(name).fingerprint for name in SPLITS] == [
        shuffled_files.split(name).fingerprint for name in SPLITS
    ]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    path = write(tmp_path / "a.bin", documents(30))
    content = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "fromfile", lambda *arguments: fail() if "part" in str(arguments[0]) else content)
    monkeypatch.setattr(shuffling, "scan", lambda *_: iter([np.frombuffer(content, NARROW)]))
    with pytest.raises(CocomixError, match="no room on disk while writing"):
        shuffle_documents(path, NARROW, 0, 0)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
