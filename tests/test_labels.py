import errno
import json
import os

import numpy as np
import pytest
import torch
from model_helpers import autoencoder
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import ConceptTeacher, LabelCache
from cocomix.config import Config, DataConfig, LabelsConfig, TeacherConfig
from cocomix.data import WindowDataset, prepare
from cocomix.errors import CocomixError
from cocomix.files import read_json
from cocomix.labels import require_vocabulary, run

SHAPE = {"n_windows": 10, "seq_len": 6, "label_topk": 3, "shard_windows": 4}  # shards of 4, 4 and 2 windows
FINGERPRINTS = {"data": "d", "teacher": "t", "sae": "s", "layer": "5", "label_topk": "3", "dtype": "float32",
                "seq_len": "6"}


def new_cache(folder, **settings):
    return LabelCache.create(folder, **{**SHAPE, "fingerprints": FINGERPRINTS, **settings})


def random_labels(seed=0, high=65535):
    labels = np.random.default_rng(seed).integers(-1, high, (SHAPE["n_windows"], SHAPE["seq_len"], 3))
    labels[0, 0], labels[9, -1] = (65534, -1, 0), (-1, -1, -1)
    return labels


def fill(cache, labels, shards=None):
    for shard in cache.missing_shards() if shards is None else shards:
        cache.append(shard, labels[cache.windows_of(shard)])


# --- the cache


def test_labels_come_back_as_they_were_written(tmp_path):
    labels = random_labels()
    cache = new_cache(tmp_path)
    fill(cache, labels)
    for opened in (cache, LabelCache.open(tmp_path)):
        opened.require(FINGERPRINTS)
        opened.require_complete()
        opened.verify()
        assert opened.missing_shards() == []
        for index in range(SHAPE["n_windows"]):
            window = opened.window(index)
            assert window.dtype == np.int64
            assert np.array_equal(window, labels[index])


def test_tensors_are_taken_too(tmp_path):
    labels = random_labels()
    cache = new_cache(tmp_path)
    fill(cache, torch.from_numpy(labels))
    assert np.array_equal(cache.window(7), labels[7])


def test_a_token_takes_two_bytes_a_label(tmp_path):
    cache = new_cache(tmp_path)
    fill(cache, random_labels())
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("labels-*.bin"))]
    assert sizes == [windows * 6 * 3 * 2 + 32 for windows in (4, 4, 2)]


def test_windows_are_read_from_a_memory_map_and_are_the_readers_own(tmp_path, monkeypatch):
    cache = new_cache(tmp_path)
    labels = random_labels()
    fill(cache, labels)
    maps, memmap = [], np.memmap
    monkeypatch.setattr("numpy.memmap", lambda *args, **options: maps.append(options) or memmap(*args, **options))
    monkeypatch.setattr("numpy.fromfile", None)
    for index in (0, 1, 3, 5):
        cache.window(index)[:] = 7
    assert len(maps) == 2 and all(options["mode"] == "r" for options in maps)
    assert np.array_equal(cache.window(0), labels[0])


@pytest.mark.parametrize("index", [-1, 10])
def test_a_window_beyond_the_cache_is_an_index_error(tmp_path, index):
    cache = new_cache(tmp_path)
    fill(cache, random_labels())
    with pytest.raises(IndexError):
        cache.window(index)


def test_an_interrupted_cache_goes_on_with_what_is_missing(tmp_path):
    labels = random_labels()
    fill(new_cache(tmp_path), labels, [0, 2])
    with pytest.raises(CocomixError, match="incomplete: 1 of 3 shards are missing; run `cocomix labels` again"):
        LabelCache.open(tmp_path).require_complete()
    again = new_cache(tmp_path)
    assert again.missing_shards() == [1]
    fill(again, labels)
    again.verify()
    assert all(np.array_equal(again.window(index), labels[index]) for index in range(10))


def test_a_cache_goes_on_with_the_shards_it_was_started_with(tmp_path):
    new_cache(tmp_path)
    assert new_cache(tmp_path, shard_windows=5).shard_windows == 4


@pytest.mark.parametrize("labels, message", [
    (np.zeros((3, 6, 3), int), r"labels of shard 0 have shape \[3, 6, 3\], expected \[4, 6, 3\]"),
    (np.full((4, 6, 3), 65535), "labels range from 65535 to 65535, expected -1 to 65534"),
    (np.full((4, 6, 3), -2), "labels range from -2 to -2"),
])
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, message):
    cache = new_cache(tmp_path)
    with pytest.raises(ValueError, match=message):
        cache.append(0, labels)
    assert cache.missing_shards() == [0, 1, 2]


@pytest.mark.parametrize("new_size", [0, 17, -1])
def test_a_truncated_shard_is_named(tmp_path, new_size):
    cache = new_cache(tmp_path)
    fill(cache, random_labels())
    path = tmp_path / "labels-000001.bin"
    os.truncate(path, new_size if new_size >= 0 else path.stat().st_size - 1)
    for read in (cache.require_complete, cache.verify, lambda: LabelCache.open(tmp_path).window(5)):
        with pytest.raises(CocomixError, match=rf"{path} has \d+ bytes, expected 176: delete it"):
            read()


@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_damaged_shard_is_named(tmp_path, position):
    cache = new_cache(tmp_path)
    fill(cache, random_labels())
    path = tmp_path / "labels-000002.bin"
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)
    cache.require_complete()
    with pytest.raises(CocomixError, match=f"{path} is damaged"):
        cache.verify()


@pytest.mark.parametrize("key, name", [
    ("data", "other token files"), ("teacher", "another teacher"), ("sae", "another SAE"),
    ("layer", "another block of the teacher"), ("label_topk", "another number of labels a token"),
    ("seq_len", "another window length"), ("dtype", "a teacher in another precision"),
])
def test_labels_made_from_something_else_are_refused_by_name(tmp_path, key, name):
    new_cache(tmp_path)
    other = {**FINGERPRINTS, key: "other"}
    for use in (lambda: new_cache(tmp_path, fingerprints=other), lambda: LabelCache.open(tmp_path).require(other)):
        with pytest.raises(CocomixError, match=f"{tmp_path} was made from {name}: run `cocomix labels`"):
            use()


def test_everything_that_differs_is_named(tmp_path):
    new_cache(tmp_path)
    with pytest.raises(CocomixError, match="another SAE and another window length"):
        LabelCache.open(tmp_path).require({**FINGERPRINTS, "sae": "x", "seq_len": "7"})


def test_a_missing_and_a_broken_description_are_named(tmp_path):
    with pytest.raises(CocomixError, match=f"the label cache {tmp_path} is missing"):
        LabelCache.open(tmp_path)
    new_cache(tmp_path)
    meta = read_json(tmp_path / "meta.json", "meta")
    for content, message in [
        ({**meta, "version": 99}, "has version 99, expected 1"),
        ({key: value for key, value in meta.items() if key != "shard_windows"}, "lacks shard_windows"),
    ]:
        (tmp_path / "meta.json").write_text(json.dumps(content))
        with pytest.raises(CocomixError, match=message):
            LabelCache.open(tmp_path)


def test_a_full_disk_leaves_no_half_shard_and_the_cache_goes_on(tmp_path, monkeypatch):
    cache, labels = new_cache(tmp_path), random_labels()
    fill(cache, labels, [0])

    def full(_descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(CocomixError, match=r"no room on disk while writing .*labels-000001\.bin"):
            fill(cache, labels)
    assert sorted(os.listdir(tmp_path)) == ["labels-000000.bin", "meta.json"]
    fill(cache, labels)
    cache.verify()


def test_too_little_room_is_reported_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 359}))
    with pytest.raises(CocomixError, match="no room on disk"):
        new_cache(tmp_path)
    assert os.listdir(tmp_path) == []


# --- the command


VOCABULARY, SEQ_LEN, LAYER = 400, 16, 1


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """A folder with token files, a teacher and an SAE."""
    folder = tmp_path_factory.mktemp("frozen")
    torch.manual_seed(11)
    (folder / "text").mkdir()
    for number in range(40):
        text = f"Story {number}: the quick brown fox jumps over {number * 7} lazy dogs; señor 狐 agrees.\n" * 3
        (folder / "text" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    prepare(data_config(folder))
    GPT2LMHeadModel(GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=32)).save_pretrained(folder / "model")
    autoencoder().save(folder / "sae")
    return folder


def data_config(folder):
    return DataConfig(folder=str(folder / "data"), text=[str(folder / "text")], vocab_size=VOCABULARY,
                      val_fraction=0.2, seq_len=SEQ_LEN)


@pytest.fixture
def config(frozen, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    teacher = TeacherConfig(model=str(frozen / "model"), sae=str(frozen / "sae"), layer=LAYER, label_topk=4)
    return Config(data=data_config(frozen), teacher=teacher,
                  labels=LabelsConfig(cache=str(tmp_path / "cache"), shard_windows=7))


def online(config):
    """Labels of every training window, straight from the teacher, and the windows."""
    split = prepare(config.data).split("train")
    ids = np.stack([split.window(index, SEQ_LEN) for index in range(split.n_windows(SEQ_LEN))])
    teacher = ConceptTeacher.from_config(config.teacher, torch.device("cpu"))
    return np.concatenate([teacher.labels(torch.from_numpy(part)).numpy() for part in np.array_split(ids, 5)]), split


def assert_complete(config):
    expected, split = online(config)
    cache = LabelCache.open(config.labels.cache)
    cache.verify()
    assert cache.n_windows == len(expected) > 3 * 7
    assert all(np.array_equal(cache.window(index), labels) for index, labels in enumerate(expected))
    assert (expected[:, :-1] >= 0).any() and (expected[:, -1] == -1).all()
    return cache, split


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cached_labels_are_the_online_ones_bit_for_bit(config, capsys, dtype):
    config.teacher.dtype = dtype
    run(config)
    assert "is complete" in capsys.readouterr().out
    cache, split = assert_complete(config)
    item = WindowDataset(split, SEQ_LEN, cache)[3]
    assert np.array_equal(item["concept_labels"].numpy(), cache.window(3))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_ranks_fill_the_cache_together_whichever_is_first(config, monkeypatch, order):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in order:
        monkeypatch.setenv("RANK", str(rank))
        run(config)
    assert_complete(config)


def test_ranks_share_the_shards_evenly(config, monkeypatch):
    written, append = [], LabelCache.append
    monkeypatch.setattr(LabelCache, "append", lambda self, shard, labels: written.append(shard) or append(
        self, shard, labels))
    monkeypatch.setenv("WORLD_SIZE", "3")
    counts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        run(config)
        counts.append(len(written))
    n_shards = LabelCache.open(config.labels.cache).n_shards
    assert sorted(written) == list(range(n_shards))
    assert all(abs(count - n_shards / 3 * (rank + 1)) <= 1 for rank, count in enumerate(counts))


def test_a_stopped_command_goes_on_where_it_stopped(config, monkeypatch):
    append, written = LabelCache.append, []

    def stopping(self, shard, labels):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        append(self, shard, labels)

    with monkeypatch.context() as patch:
        patch.setattr(LabelCache, "append", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    times = {path.name: path.stat().st_mtime_ns for path in os.scandir(config.labels.cache)}
    assert len(times) == 3
    run(config)
    assert_complete(config)
    later = {path.name: path.stat().st_mtime_ns for path in os.scandir(config.labels.cache)}
    assert times.items() <= later.items()


def test_a_finished_command_does_nothing_again(config, monkeypatch):
    run(config)
    monkeypatch.setattr(ConceptTeacher, "labels", None)
    run(config)


def test_another_block_of_the_teacher_needs_another_cache(config):
    run(config)
    config.teacher.layer = 2
    with pytest.raises(CocomixError, match="was made from another block of the teacher"):
        run(config)


def test_an_unset_cache_and_a_foreign_vocabulary_are_named(config, frozen, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=32))
    tokens = prepare(config.data)
    message = f"use {tokens.vocab_size} ids but the model knows 50: it was made for another tokenizer"
    with pytest.raises(CocomixError, match=message):
        require_vocabulary(model, tokens)
    model.save_pretrained(tmp_path / "small")
    config.teacher.model = str(tmp_path / "small")
    with pytest.raises(CocomixError, match="made for another tokenizer"):
        run(config)
    config.labels.cache = None
    with pytest.raises(CocomixError, match=r"labels\.cache is not set"):
        run(config)


def test_windows_beyond_the_teachers_context_are_refused(config):
    config.data.seq_len = 33
    with pytest.raises(CocomixError, match="windows of 33 tokens"):
        run(config)
