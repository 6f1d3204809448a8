"""Token files as they are read: whole windows, found damaged before a wrong token is."""

import json
import os
import pickle

import numpy as np
import pytest
from stored_json import change_json

from cocomix.core.block_sums import BLOCK_BYTES, SUM_DTYPE, BlockSums
from cocomix.core.errors import CocomixError
from cocomix.core.mapped_file import MappedFile
from cocomix.data.preparation import prepare
from cocomix.data.token_files import TokenFiles, TokenSplit, describe_split


def test_meta_of_another_format_or_without_its_keys_is_refused(config):
    meta = prepare(config).folder / "meta.json"
    for change, without, problem in (({"format": 99}, (), "has format 99"), ({"format": 1}, ("eot_id",), "`eot_id`")):
        change_json(meta, change, without)
        with pytest.raises(CocomixError, match=problem):
            TokenFiles.open(config.folder)


def test_windows_cut_the_tokens_without_overlap(make_split):
    split = make_split(range(50))
    assert split.n_windows(8) == 6
    for index in range(6):
        window = split.window(index, 8)
        assert window.dtype == np.int64
        assert window.tolist() == list(range(index * 8, index * 8 + 8))
    for index in (-1, 6):
        with pytest.raises(IndexError):
            split.window(index, 8)


def test_consecutive_windows_come_in_one_go(make_split):
    split = make_split(range(50))
    several = split.windows(range(1, 4), 8)
    assert several.dtype == np.int64
    assert several.tolist() == [split.window(index, 8).tolist() for index in (1, 2, 3)]
    for indices in (range(-1, 2), range(4, 7), range(2, 2)):
        with pytest.raises(IndexError):
            split.windows(indices, 8)


def in_page_cache(descriptor, position):
    try:
        return bool(os.preadv(descriptor, [bytearray(16)], position, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        pytest.skip("this file system does not say what it has in memory")


def checksums_of(path):
    sums = BlockSums()
    sums.update(path.read_bytes())
    return np.frombuffer(sums.digest(), SUM_DTYPE)


@pytest.mark.parametrize("sound", [None, False, True], ids=["without checksums", "first time", "again"])
def test_a_window_is_fetched_without_what_lies_around_it(tmp_path, sound):
    path, n_bytes = tmp_path / "numbers.bin", 16 << 20
    path.write_bytes(os.urandom(n_bytes))
    mapped = MappedFile(path, "<u2", n_bytes, unit="tokens", remedy="mend")
    around = {-65536, 8192, 65536, 262_144}
    if sound is not None:
        mapped.check(n_bytes, checksums_of(path), np.full(n_bytes // BLOCK_BYTES, sound))
        around -= set() if sound else {8192}  # in the same block
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        middle = n_bytes // 2
        if in_page_cache(file.fileno(), middle):
            pytest.skip("this file system keeps what it has written in memory")
        expected = np.fromfile(path, "<u2", offset=middle, count=1024)
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert mapped.read(middle // 2, 1024).tolist() == expected.tolist()
        assert in_page_cache(file.fileno(), middle)
        assert not any(in_page_cache(file.fileno(), middle + offset) for offset in around)


def test_a_split_shorter_than_a_window_says_how_long_it_is(make_split):
    with pytest.raises(CocomixError, match="has 7 tokens, fewer than one window of data.seq_len=8"):
        make_split(range(7)).n_windows(8)
    assert make_split(range(8)).n_windows(8) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"\0" * 18, "has 18 bytes, expected 20"),
        (b"\0" * 19, "has 19 bytes, an odd number"),
        (b"\0" * 22, "has 22 bytes, expected 20"),
        (b"", "has 0 bytes"),
        (None, "there is no"),
    ],
)
def test_a_file_of_the_wrong_size_is_refused_with_the_mend(make_split, content, problem):
    path = make_split(range(10)).path
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(CocomixError, match=rf"{problem}(?s:.*)run `cocomix data` again"):
        TokenSplit(path, 10, 50, "")


def test_an_id_beyond_the_vocabulary_is_found_when_it_is_read(make_split):
    split = make_split([*range(20), 50, *range(11)])
    split.window(0, 8)
    for read in (lambda: split.window(2, 8), split.verify):
        with pytest.raises(CocomixError, match=r"train\.bin: token 20 has id 50, but the vocabulary has 50 ids"):
            read()


def test_verify_finds_a_changed_token(make_split):
    split = make_split(range(20))
    split.verify()
    split.path.write_bytes(np.arange(1, 21, dtype="<u2").tobytes())
    with pytest.raises(CocomixError, match="has changed since it was made"):
        split.verify()


def test_a_split_is_read_only_and_pickles_without_its_tokens(make_split):
    split = make_split(np.arange(40_000) % 50)
    with pytest.raises(ValueError, match="read-only"):
        split.tokens[0] = 1
    pickled = pickle.dumps(split)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).window(3, 8).tolist() == split.window(3, 8).tolist()


def damage(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture
def long_split(tmp_path):
    """A split of several blocks, with checksums: its path and how to open it."""
    ids = np.random.default_rng(0).integers(0, 50, 100_000)
    ids.astype("<u2").tofile(tmp_path / "train.bin")
    record = describe_split(tmp_path, "train", {"tokens": len(ids), "documents": 1, "text_bytes": 1}, np.dtype("<u2"))

    def opened():
        return TokenSplit(tmp_path / record.file, record.tokens, 50, record.sha256, tmp_path / record.sums)

    return tmp_path / "train.bin", ids, opened


@pytest.mark.parametrize("token", [0, 32_767, 32_768, 70_000, 99_999])
def test_a_changed_token_is_found_by_the_windows_of_its_block_and_stops_no_others(long_split, token):
    path, ids, opened = long_split
    damage(path, 2 * token)
    split, damaged_block = opened(), 2 * token // BLOCK_BYTES
    for index in range(split.n_windows(1000)):
        touched = range(2000 * index // BLOCK_BYTES, (2000 * index + 1999) // BLOCK_BYTES + 1)
        if damaged_block in touched:
            first = damaged_block * BLOCK_BYTES
            with pytest.raises(CocomixError, match=rf"{path} is damaged: the checksum of bytes {first:,} to .*delete"):
                split.window(index, 1000)
        else:
            assert np.array_equal(split.window(index, 1000), ids[1000 * index : 1000 * (index + 1)])


def test_a_split_with_checksums_pickles_with_them(long_split):
    path, ids, opened = long_split
    damage(path, 0)
    split = pickle.loads(pickle.dumps(opened()))
    assert np.array_equal(split.window(80, 1000), ids[80_000:81_000])
    with pytest.raises(CocomixError, match="is damaged"):
        split.window(0, 1000)


def test_checksums_that_are_cut_off_missing_or_damaged_are_named(long_split, tmp_path):
    _, _, opened = long_split
    sums = tmp_path / "train.sums"
    whole = sums.read_bytes()
    opened().verify()
    damage(sums, 5)
    with pytest.raises(CocomixError, match=r"train\.sums is damaged"):
        opened().verify()
    sums.write_bytes(whole[:-1])
    with pytest.raises(CocomixError, match=r"train\.sums has 15 bytes"):
        opened()
    sums.unlink()
    with pytest.raises(CocomixError, match=r"there is no .*train\.sums"):
        opened()


def test_token_files_of_earlier_versions_are_read_and_said_once(config, capsys):
    files = prepare(config)
    window = files.split("train").window(0, 8)
    meta = json.loads((files.folder / "meta.json").read_text())
    splits = {name: {key: split[key] for key in split if key != "sums"} for name, split in meta["splits"].items()}
    change_json(files.folder / "meta.json", {"splits": splits})
    for name in ("train", "val"):
        (files.folder / f"{name}.sums").unlink()
    capsys.readouterr()
    old = [TokenFiles.open(config.folder).split("train") for _ in range(2)]
    assert np.array_equal(old[0].window(0, 8), window)
    assert capsys.readouterr().err.count("without checksums") == 1


@pytest.mark.parametrize("name", ["../train.bin", "/etc/passwd", "a/b", "", ".hidden\n"])
def test_no_split_lies_outside_its_folder(config, name):
    files = prepare(config)
    meta = json.loads((files.folder / "meta.json").read_text())
    meta["splits"]["train"]["file"] = name
    change_json(files.folder / "meta.json", {"splits": meta["splits"]})
    with pytest.raises(CocomixError, match=r"meta\.json.*splits"):
        TokenFiles.open(config.folder)
