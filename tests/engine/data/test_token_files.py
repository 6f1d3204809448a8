import builtins
import errno
import hashlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cocomix.core.config import DataConfig
from cocomix.core.errors import CocomixError
from cocomix.core.mapped_file import MappedFile
from cocomix.data.documents import Piece
from cocomix.data.preparation import Splitter, prepare
from cocomix.data.token_files import TokenFiles, TokenSplit
from cocomix.data.tokenizer import train_tokenizer
from cocomix.data.windows import MicroBatchSampler, WindowDataset, WindowOrder, step_windows


def story(number: int) -> str:
    return f"Story {number}: the quick brown fox — señor 狐 — jumps over {number * 7} lazy dogs.\n" * 5


@pytest.fixture
def config(tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number in range(60):
        (corpus / f"{number:02}.txt").write_text(story(number), encoding="utf-8")
    return DataConfig(folder=str(tmp_path / "data"), text=[str(corpus)], vocab_size=400, val_fraction=0.2)


def split_tokens(files: TokenFiles, name: str) -> list[int]:
    return np.fromfile(files.folder / f"{name}.bin", dtype="<u2").tolist()


def test_token_files_are_the_documents_each_followed_by_end_of_text(config):
    files = prepare(config)
    tokenizer = files.tokenizer()
    expected, side = {"train": [], "val": []}, Splitter(0.2)
    for number in range(60):
        ids = tokenizer(story(number), add_special_tokens=False)["input_ids"]
        expected[side(Piece(number, story(number), True))] += [*ids, files.eot_id]
    for name in ("train", "val"):
        assert split_tokens(files, name) == expected[name]
        entry = files.meta["splits"][name]
        assert entry["tokens"] == len(expected[name]) == files.split(name).n_tokens
        assert entry["documents"] == expected[name].count(files.eot_id)
        assert entry["sha256"] == hashlib.sha256((files.folder / f"{name}.bin").read_bytes()).hexdigest()
        files.split(name).verify()
    assert sum(files.meta["splits"][name]["text_bytes"] for name in expected) == sum(
        len(story(number).encode()) for number in range(60)
    )


def test_the_vocabulary_is_the_tokenizers_own(config):
    files = prepare(config)
    assert files.vocab_size == len(files.tokenizer()) <= 400
    assert files.eot_id == files.tokenizer().eos_token_id == 0


def test_the_same_text_gives_the_same_bytes(config, tmp_path):
    first = prepare(config)
    config.folder = str(tmp_path / "again")
    second = prepare(config)
    assert first.split("train").fingerprint == second.split("train").fingerprint
    assert first.split("val").fingerprint == second.split("val").fingerprint


def test_a_given_tokenizer_is_used_and_kept(config, tmp_path):
    train_tokenizer([story(1)], 300).save_pretrained(tmp_path / "given")
    config.tokenizer = str(tmp_path / "given")
    files = prepare(config)
    assert files.vocab_size <= 300
    assert files.tokenizer().get_vocab() == train_tokenizer([story(1)], 300).get_vocab()
    config.vocab_size = 999  # has no meaning for a tokenizer that is given
    prepare(config)


def test_a_tokenizer_without_end_of_text_a_broken_and_a_large_one_are_refused(config, tmp_path):
    config.tokenizer = str(tmp_path / "given")
    (tmp_path / "given").mkdir()
    with pytest.raises(CocomixError, match="given cannot be loaded"):
        prepare(config)
    tokenizer = train_tokenizer([story(1)], 300)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(config.tokenizer)
    with pytest.raises(CocomixError, match="given has no end-of-text token"):
        prepare(config)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.add_tokens([f"token{number}" for number in range(65_500)])
    tokenizer.save_pretrained(config.tokenizer)
    with pytest.raises(CocomixError, match="at most 65536 ids"):
        prepare(config)
    assert not (tmp_path / "data" / "meta.json").exists()


def test_max_tokens_ends_with_the_document_that_reaches_it(config, tmp_path):
    whole = prepare(config)
    config.folder, config.max_tokens = str(tmp_path / "less"), 1000
    less = prepare(config)
    for name in ("train", "val"):
        tokens = split_tokens(less, name)
        assert tokens and tokens[-1] == less.eot_id
        assert tokens == split_tokens(whole, name)[: len(tokens)]
    total = sum(less.split(name).n_tokens for name in ("train", "val"))
    assert 1000 <= total < 1000 + len(less.tokenizer()(story(59))["input_ids"]) + 10


def test_the_unigram_perplexity_is_that_of_the_training_frequencies(config):
    files = prepare(config)
    train, val = (split_tokens(files, name) for name in ("train", "val"))
    nats = [-np.log((train.count(token) + 1) / (len(train) + files.vocab_size)) for token in val]
    assert files.meta["val_unigram_perplexity"] == pytest.approx(np.exp(np.mean(nats)))


def test_a_second_run_is_told_that_the_folder_is_up_to_date(config, capsys):
    files = prepare(config)
    stamp = (files.folder / "train.bin").stat().st_mtime_ns
    capsys.readouterr()
    assert prepare(config).meta == files.meta
    assert "up to date" in capsys.readouterr().out
    assert (files.folder / "train.bin").stat().st_mtime_ns == stamp


def test_a_folder_made_from_something_else_is_left_alone(config, tmp_path):
    files = prepare(config)
    before = files.split("train").fingerprint
    config.vocab_size = 500
    with pytest.raises(CocomixError, match="data.vocab_size was 400 and is 500.*Set data.folder .* or delete"):
        prepare(config)
    config.vocab_size = 400
    (tmp_path / "corpus" / "07.txt").write_text("changed", encoding="utf-8")
    with pytest.raises(CocomixError, match="the text changed: .*60 files of .* then"):
        prepare(config)
    config.text.append("stdlib")
    with pytest.raises(CocomixError, match="data.text was"):
        prepare(config)
    TokenFiles.open(config.folder).split("train").verify()
    assert files.split("train").fingerprint == before


def test_a_given_tokenizer_that_changed_counts_as_something_else(config, tmp_path):
    config.tokenizer = str(tmp_path / "given")
    train_tokenizer([story(1)], 300).save_pretrained(config.tokenizer)
    prepare(config)
    train_tokenizer([story(1)], 280).save_pretrained(config.tokenizer)
    with pytest.raises(CocomixError, match="data.tokenizer_sha256 was"):
        prepare(config)


def test_a_full_disk_leaves_nothing_behind(config, monkeypatch):
    class FullDisk:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            self.file.close()

        def write(self, data):
            self.file.write(data[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_open(path, mode="r", **options):
        file = builtins.open(path, mode, **options)
        return FullDisk(file) if "w" in mode else file

    with monkeypatch.context() as patch:
        patch.setattr("cocomix.core.files.open", full_open, raising=False)
        with pytest.raises(CocomixError, match="no room on disk while writing"):
            prepare(config)
    assert os.listdir(config.folder) == []
    prepare(config).split("train").verify()


def test_an_interrupted_run_starts_again_and_sweeps_up(config, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("cocomix.data.preparation._save_tokenizer", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    ended, running = (subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2))
    ended.communicate(b"\n")
    half = {process: Path(config.folder, f".train.bin.{process.pid}.part") for process in (ended, running)}
    for path in half.values():
        path.write_bytes(b"half")
    with pytest.raises(CocomixError, match="description of the token files .* is missing"):
        TokenFiles.open(config.folder)
    prepare(config).split("train").verify()
    running.communicate(b"\n")
    assert sorted(os.listdir(config.folder)) == [half[running].name, "meta.json", "tokenizer", "train.bin", "val.bin"]


def test_a_bad_record_in_the_middle_leaves_nothing_behind(config, tmp_path):
    (tmp_path / "corpus" / "30.jsonl").write_text('{"text": "good"}\n{"text": "cut\n', encoding="utf-8")
    with pytest.raises(CocomixError, match=r"30\.jsonl, line 2"):
        prepare(config)
    assert os.listdir(config.folder) == []


def test_a_file_in_the_place_of_the_folder_is_named(config, tmp_path):
    (tmp_path / "data").write_text("in the way", encoding="utf-8")
    with pytest.raises(CocomixError, match="data.folder: .*data cannot be made"):
        prepare(config)


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.5])
def test_the_split_keeps_its_share_and_never_leaves_a_side_empty(fraction):
    lengths = np.random.default_rng(0).lognormal(5, 1.5, size=5000).astype(int) + 1
    side, chars = Splitter(fraction), {"train": 0, "val": 0}
    for document, length in enumerate(lengths.tolist()):
        name = side(Piece(document, "x" * length, True))
        chars[name] += length
        assert document > 1 or name == ("train", "val")[document]
        # beyond the share goes at most the document that filled it, and short of it at most what came since
        assert abs(chars["val"] - fraction * sum(chars.values())) <= lengths[: document + 1].max()


def test_a_short_second_document_does_not_leave_validation_short():
    side, texts = Splitter(0.1), ["x" * 1000, "x", "x" * 50, "x" * 500, "x" * 500]
    assert [side(Piece(i, text, True)) for i, text in enumerate(texts)] == ["train", "val", "val", "val", "train"]


def test_the_pieces_of_a_document_stay_together():
    side = Splitter(0.5)
    pieces = [Piece(0, "xx", False), Piece(0, "xx", True), Piece(1, "x" * 9, False), Piece(1, "x", True)]
    assert [side(piece) for piece in pieces] == ["train", "train", "val", "val"]


def test_one_document_is_split_by_tokens(config, tmp_path):
    (tmp_path / "one.txt").write_text(story(3) * 20, encoding="utf-8")
    config.text = [str(tmp_path / "one.txt")]
    files = prepare(config)
    train, val = split_tokens(files, "train"), split_tokens(files, "val")
    whole = [*files.tokenizer()(story(3) * 20, add_special_tokens=False)["input_ids"], files.eot_id]
    assert train + val == whole
    assert len(val) == pytest.approx(0.2 * len(whole), abs=1)
    for name in ("train", "val"):
        files.split(name).verify()
    assert sum(entry["text_bytes"] for entry in files.meta["splits"].values()) == len(story(3).encode()) * 20


def test_one_character_still_makes_two_files(config, tmp_path):
    (tmp_path / "one.txt").write_text("x", encoding="utf-8")
    config.text = [str(tmp_path / "one.txt")]
    files = prepare(config)
    assert files.split("train").n_tokens == files.split("val").n_tokens == 1
    assert files.vocab_size == 257


def test_a_local_hugging_face_dataset_becomes_token_files(config, tmp_path):
    (tmp_path / "rows").mkdir()
    rows = "".join(json.dumps({"text": story(number)}) + "\n" for number in range(20))
    (tmp_path / "rows" / "train.jsonl").write_text(rows, encoding="utf-8")
    config.text = [f"hf:{tmp_path / 'rows'}"]
    files = prepare(config)
    decoded = files.tokenizer().decode(split_tokens(files, "train") + split_tokens(files, "val"))
    assert sorted(decoded.split("<|endoftext|>")) == sorted(["", *(story(number) for number in range(20))])
    prepare(config)
    (tmp_path / "rows" / "train.jsonl").write_text(rows * 2, encoding="utf-8")
    with pytest.raises(CocomixError, match="the text changed"):
        prepare(config)


def test_meta_of_another_format_or_without_its_keys_is_refused(config):
    meta = prepare(config).folder / "meta.json"
    content = json.loads(meta.read_text(encoding="utf-8"))
    for change, problem in (({"format": 99}, "has format 99"), ({"eot_id": None}, "lacks eot_id")):
        changed = {key: value for key, value in {**content, **change}.items() if value is not None}
        meta.write_text(json.dumps(changed), encoding="utf-8")
        with pytest.raises(CocomixError, match=problem):
            TokenFiles.open(config.folder)


@pytest.fixture
def make_split(tmp_path):
    def make(ids, vocab_size=50):
        content = np.asarray(ids, dtype="<u2").tobytes()
        (tmp_path / "train.bin").write_bytes(content)
        return TokenSplit(tmp_path / "train.bin", len(ids), vocab_size, hashlib.sha256(content).hexdigest())

    return make


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


def resident_file_kib():
    """Pages of files that are mapped into this process."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1])


def test_a_hundred_billion_tokens_are_opened_ordered_and_read_at_once_and_in_flat_memory(tmp_path):
    path, n_tokens = tmp_path / "train.bin", 10**11
    path.touch()
    os.truncate(path, 2 * n_tokens)  # a sparse file: 200 GB that take no room
    start = time.perf_counter()
    split = TokenSplit(path, n_tokens, 50, "fingerprint")
    order = WindowOrder(split.n_windows(1024), seed=0)
    batch = step_windows(order, 150_000, 512)
    sampler = MicroBatchSampler(order, 512, 8, 3, 8, 150_000, 190_000)
    windows = WindowDataset(split, 1024)
    assert len(sampler) == 320_000 and len(windows) == 97_656_250
    assert next(iter(sampler)) == batch.reshape(8, 8, 8)[0, 3].tolist()
    assert windows[int(batch.max())]["input_ids"].tolist() == [0] * 1024
    assert time.perf_counter() - start < 0.5
    before, start = resident_file_kib(), time.perf_counter()
    for index in order[np.arange(10_000)]:
        split.window(int(index), 1024)
    assert resident_file_kib() - before < 8192  # 40,000 were every page that has been read still mapped
    assert time.perf_counter() - start < 5


def in_page_cache(descriptor, position):
    try:
        return bool(os.preadv(descriptor, [bytearray(16)], position, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        pytest.skip("this file system does not say what it has in memory")


def test_a_window_is_fetched_without_what_lies_around_it(tmp_path):
    path, n_bytes = tmp_path / "numbers.bin", 16 << 20
    path.write_bytes(os.urandom(n_bytes))
    mapped = MappedFile(path, "<u2", n_bytes, unit="tokens", mend="mend")
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
        assert not any(in_page_cache(file.fileno(), middle + offset) for offset in (-65536, 8192, 65536, 262_144))


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


@pytest.mark.parametrize("n_windows", [1, 2, 3, 7, 64, 97, 1000, 4097])
def test_every_window_comes_once_in_every_epoch(n_windows):
    order = WindowOrder(n_windows, seed=5)
    for epoch in (0, 1, 1000):
        windows = order[np.arange(epoch * n_windows, (epoch + 1) * n_windows)]
        assert sorted(windows.tolist()) == list(range(n_windows))


def test_the_order_depends_on_seed_and_epoch_only():
    positions = np.arange(2000)
    order = WindowOrder(1000, seed=1)
    windows = order[positions]
    assert windows.dtype == np.int64
    assert windows[:1000].tolist() != windows[1000:].tolist()
    assert windows.tolist() != WindowOrder(1000, seed=2)[positions].tolist()
    shuffled = np.random.default_rng(0).permutation(positions).reshape(40, 50)
    assert (WindowOrder(1000, seed=1)[shuffled] == windows[shuffled]).all()
    assert order[np.array([], dtype=np.int64)].shape == (0,)
    with pytest.raises(IndexError):
        order[np.array([-1])]


def test_the_order_is_what_it_always_was():
    # runs resume by it: a change here would silently feed a resumed run other data
    assert WindowOrder(10, 0)[np.arange(12)].tolist() == [0, 4, 2, 8, 6, 7, 9, 1, 3, 5, 1, 5]
    assert WindowOrder(10**12, 7)[np.arange(3)].tolist() == [254690426986, 183355503425, 688083858891]


def test_the_order_is_random_and_reads_a_hundred_million_windows_in_no_memory():
    windows = WindowOrder(10**8, seed=3)[np.arange(200_000)]
    assert len(np.unique(windows)) == 200_000
    counts, _ = np.histogram(windows, bins=20, range=(0, 10**8))
    assert abs(counts - 10_000).max() < 500
    assert abs(np.corrcoef(windows[:-1], windows[1:])[0, 1]) < 0.01


def test_small_orders_reach_every_permutation_about_equally_often():
    orders = [tuple(WindowOrder(4, seed)[np.arange(4)].tolist()) for seed in range(2400)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert min(counts) > 50 and max(counts) < 150


def test_steps_cut_the_order_into_consecutive_batches():
    order = WindowOrder(10, seed=0)
    steps = [step_windows(order, step, 4) for step in range(5)]
    assert [len(step) for step in steps] == [4] * 5
    assert np.concatenate(steps).tolist() == order[np.arange(20)].tolist()


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 8), (1, 2), (2, 4), (4, 1), (2, 2)])
def test_the_ranks_micro_batches_make_up_the_step_in_rounds_of_ranks(world_size, micro_batch):
    order = WindowOrder(30, seed=0)
    ranks = [list(MicroBatchSampler(order, 8, micro_batch, rank, world_size, 3, 6)) for rank in range(world_size)]
    rounds = 8 // (micro_batch * world_size)
    assert all(len(rank) == 3 * rounds for rank in ranks)
    for step in range(3, 6):
        first = (step - 3) * rounds
        joined = [window for a in range(first, first + rounds) for rank in ranks for window in rank[a]]
        assert joined == step_windows(order, step, 8).tolist()


def test_a_sampler_that_starts_later_goes_on_where_an_earlier_one_would_be():
    order = WindowOrder(30, seed=0)
    whole = MicroBatchSampler(order, 8, 2, 1, 2, 0, 9)
    resumed = MicroBatchSampler(order, 8, 2, 1, 2, 4, 9)
    assert list(whole)[4 * 2 :] == list(resumed)
    assert len(whole) == 18 and len(resumed) == 10
    assert len(MicroBatchSampler(order, 8, 2, 1, 2, 9, 9)) == 0


def test_a_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(CocomixError, match=r"train.global_batch \(8\) must be a multiple of .* \(3\) x 2 ranks"):
        MicroBatchSampler(WindowOrder(30, 0), 8, 3, 0, 2, 0, 1)


class FakeLabels:
    def window(self, index):
        return {"concept_labels": np.full((8, 4), index)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_gives_windows_with_their_labels(make_split, workers):
    split = make_split(np.arange(320) % 50)
    order = WindowOrder(split.n_windows(8), seed=0)
    sampler = MicroBatchSampler(order, 4, 2, 0, 1, 1, 3)
    loader = DataLoader(WindowDataset(split, 8, FakeLabels()), batch_sampler=sampler, num_workers=workers)
    assert len(loader) == 4
    for batch, windows in zip(loader, sampler, strict=True):
        assert batch["input_ids"].dtype == batch["concept_labels"].dtype == torch.int64
        assert batch["input_ids"].tolist() == [split.window(index, 8).tolist() for index in windows]
        assert batch["concept_labels"].shape == (2, 8, 4)
        assert batch["concept_labels"][:, 0, 0].tolist() == windows


def test_a_dataset_without_labels_has_none(make_split):
    dataset = WindowDataset(make_split(range(40)), 8)
    assert len(dataset) == 5
    assert set(dataset[4]) == {"input_ids"}
