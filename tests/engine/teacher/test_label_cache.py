import contextlib
import errno
import json
import math
import mmap
import os
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from model_helpers import autoencoder
from stored_json import change_json
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import ConceptTeacher, LabelCache, SparseAutoencoder
from cocomix.core.block_sums import BLOCK_BYTES
from cocomix.core.config import ConceptLabelsConfig, Config, DataConfig, TeacherConfig
from cocomix.core.errors import CocomixError
from cocomix.core.files import read_json
from cocomix.core.methods import CONCEPT_LABELS
from cocomix.data.preparation import prepare
from cocomix.data.token_files import TokenFiles
from cocomix.data.windows import WindowDataset
from cocomix.teacher.extraction import run
from cocomix.teacher.language_model import require_vocabulary
from cocomix.teacher.supervision import Supervision

SHAPE = {"n_windows": 10, "seq_len": 6, "label_topk": 3, "shard_windows": 4}  # shards of 4, 4 and 2 windows
FINGERPRINTS = {
    "data": "d" * 64,
    "teacher": "t" * 64,
    "sae": "s" * 64,
    "layer": "5",
    "label_topk": "3",
    "dtype": "float32",
    "seq_len": "6",
}


def new_cache(folder, **settings):
    return LabelCache.create(folder, **{**SHAPE, "fingerprints": FINGERPRINTS, **settings})


def trailer(n_blocks) -> int:
    """Bytes after a shard's numbers: a checksum a block, what it was made from, a checksum of all."""
    return 4 * math.ceil(n_blocks) + 32 + 32


def random_labels(seed=0, high=65535):
    labels = np.random.default_rng(seed).integers(-1, high, (SHAPE["n_windows"], SHAPE["seq_len"], 3))
    labels[0, 0], labels[9, -1] = (65534, -1, 0), (-1, -1, -1)
    return labels


def missing(cache):
    present = os.listdir(cache.folder)
    return [shard for shard in range(cache.n_shards) if f"labels-{shard:06d}.bin" not in present]


def fill(cache, labels, shards=None):
    for shard in missing(cache) if shards is None else shards:
        cache.append(shard, labels[cache.windows_of(shard)])


def flip_a_bit(path, position=100):
    content = bytearray(path.read_bytes())
    content[position % len(content)] ^= 1
    path.write_bytes(content)


# --- the cache


def test_labels_come_back_as_they_were_written(tmp_path):
    labels = random_labels()
    cache = new_cache(tmp_path)
    fill(cache, labels)
    for opened in (cache, LabelCache.open(tmp_path)):
        opened.require(FINGERPRINTS)
        opened.require_complete()
        opened.verify()
        assert opened.n_missing() == 0
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
    assert sizes == [windows * 6 * 3 * 2 + trailer(1) for windows in (4, 4, 2)]


def test_windows_are_read_from_a_memory_map_and_are_the_readers_own(tmp_path, monkeypatch):
    cache = new_cache(tmp_path)
    labels = random_labels()
    fill(cache, labels)
    maps, mapped = [], mmap.mmap
    monkeypatch.setattr("mmap.mmap", lambda *args, **options: maps.append(options) or mapped(*args, **options))
    for index in (0, 1, 3, 5):
        cache.window(index)[:] = 7
    assert [options["access"] for options in maps] == [mmap.ACCESS_READ] * 2
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
    assert again.n_missing() == 1 and missing(again) == [1]
    fill(again, labels)
    again.verify()
    assert all(np.array_equal(again.window(index), labels[index]) for index in range(10))


def test_a_cache_goes_on_with_the_shards_it_was_started_with(tmp_path):
    new_cache(tmp_path)
    assert new_cache(tmp_path, shard_windows=5).shard_windows == 4


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.zeros((4, 5, 3), int), r"labels of shard 0 have shape \[4, 5, 3\], expected \[4, 6, 3\]"),
        (np.zeros((3, 6, 3), int), "shard 0 got labels of 3 windows, expected 4"),
        (np.full((4, 6, 3), 65535), "labels range from 65535 to 65535, expected -1 to 65534"),
        (np.full((4, 6, 3), -2), "labels range from -2 to -2"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path, labels, message):
    cache = new_cache(tmp_path)
    with pytest.raises(ValueError, match=message):
        cache.append(0, labels)
    assert missing(cache) == [0, 1, 2] and os.listdir(tmp_path) == ["meta.json"]


@pytest.mark.parametrize("new_size", [0, 17, -1])
def test_a_truncated_shard_is_named(tmp_path, new_size):
    cache = new_cache(tmp_path)
    fill(cache, random_labels())
    path = tmp_path / "labels-000001.bin"
    os.truncate(path, new_size if new_size >= 0 else path.stat().st_size - 1)
    for read in (cache.require_complete, cache.verify, lambda: LabelCache.open(tmp_path).window(5)):
        with pytest.raises(
            CocomixError, match=rf"{path} has \d+ bytes.*, expected {144 + trailer(1)}: run `cocomix labels` again"
        ):
            read()


@pytest.mark.parametrize("position", [0, 100, -1])
def test_a_damaged_shard_is_named(tmp_path, position):
    cache = new_cache(tmp_path)
    fill(cache, random_labels())
    path = tmp_path / "labels-000002.bin"
    flip_a_bit(path, position)
    cache.require_complete()
    assert [cache.damage(shard) is None for shard in range(3)] == [True, True, False]
    with pytest.raises(CocomixError, match=f"{path} is damaged .*: run `cocomix labels` again"):
        cache.verify()


def test_a_checksum_is_taken_over_all_parts_of_a_large_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("cocomix.teacher.shard_cache._READ_BYTES", 7)
    cache = new_cache(tmp_path)
    fill(cache, random_labels())
    cache.verify()
    for position in (6, 7, 143):
        flip_a_bit(tmp_path / "labels-000000.bin", position)
        assert "is damaged" in cache.damage(0)
        flip_a_bit(tmp_path / "labels-000000.bin", position)
    assert cache.damage(0) is None


def test_a_shard_is_written_and_verified_in_a_fraction_of_its_size(tmp_path):
    shape = {"n_windows": 4096, "seq_len": 256, "label_topk": 4, "shard_windows": 4096}
    cache, size = new_cache(tmp_path, **shape), 4096 * 256 * 4 * 2
    tracemalloc.start()
    try:
        with cache.writer(0) as write:
            for _ in range(128):
                write(np.full((32, 256, 4), 5))
        assert cache.damage(0) is None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "labels-000000.bin").stat().st_size == size + trailer(size / 2**16)
    assert peak < size / 3
    assert (cache.window(4095) == 5).all()


def test_a_shard_that_is_not_filled_does_not_appear(tmp_path):
    cache, labels = new_cache(tmp_path), random_labels()
    with pytest.raises(ValueError, match="shard 0 got labels of 3 windows, expected 4"), cache.writer(0) as write:
        write(labels[:3])
    with pytest.raises(ValueError, match="labels of shard 0 have shape"), cache.writer(0) as write:
        write(labels[:3])
        write(labels[:2])
    assert os.listdir(tmp_path) == ["meta.json"]


# --- many shards, many processes


def test_a_cache_for_a_hundred_billion_tokens_is_looked_through_by_its_listing(tmp_path, monkeypatch):
    shape = {"n_windows": 10**8, "seq_len": 1024, "label_topk": 4, "shard_windows": 4096}
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: type("Usage", (), {"free": 10**13}))
    cache = new_cache(tmp_path, **shape)
    assert cache.n_shards == 24_415
    for shard in range(cache.n_shards):
        with open(tmp_path / f"labels-{shard:06d}.bin", "wb") as file:
            os.truncate(file.fileno(), len(cache.windows_of(shard)) * 8192 + trailer(len(cache.windows_of(shard)) / 8))
    for other in ("labels-0000001.bin", "labels-000001.bin.bak", "labels-024415.bin", "labels-00001.bin", "notes"):
        (tmp_path / other).touch()
    looks, stat = [], Path.stat
    monkeypatch.setattr(Path, "stat", lambda path, **options: looks.append(path) or stat(path, **options))
    tracemalloc.start()
    start = time.perf_counter()
    assert cache.n_missing() == 0
    assert not looks
    LabelCache.open(tmp_path).require_complete(rank=3, world=512)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2 and peak < 2**20
    assert len(looks) == len(range(3, cache.n_shards, 512))
    os.remove(tmp_path / "labels-024414.bin")
    assert cache.n_missing() == 1 and cache.unclaimed(7) == 24_414
    with pytest.raises(CocomixError, match="1 of 24415 shards are missing"):
        cache.require_complete(rank=3, world=512)


def test_every_rank_checks_its_own_share_of_the_sizes(tmp_path):
    cache = new_cache(tmp_path)
    fill(cache, random_labels())
    os.truncate(tmp_path / "labels-000001.bin", 5)
    cache.require_complete(rank=0, world=2)
    with pytest.raises(CocomixError, match="000001.bin has 5 bytes"):
        cache.require_complete(rank=1, world=2)


def test_what_nobody_is_at_is_claimed_round_about(tmp_path):
    cache, labels = new_cache(tmp_path), random_labels()
    assert [cache.unclaimed(start) for start in range(4)] == [0, 1, 2, 0]
    fill(cache, labels, [1])
    assert [cache.unclaimed(start) for start in range(3)] == [0, 2, 2]
    with cache.writer(2) as write:
        assert cache.unclaimed(1) == 0
        write(labels[8:])
    fill(cache, labels, [0])
    assert cache.unclaimed(0) is None


def test_what_a_killed_process_left_is_taken_up_and_removed_after_an_hour(tmp_path):
    cache = new_cache(tmp_path)
    fill(cache, random_labels(), [0, 1])
    left = tmp_path / ".labels-000002.bin.0123abcd.4711.part"
    left.write_bytes(b"half")
    cache.remove_abandoned()
    assert left.exists() and cache.unclaimed(0) is None and cache.n_missing() == 1
    os.utime(left, (time.time() - 3700,) * 2)
    assert cache.unclaimed(0) == 2
    cache.remove_abandoned()
    assert not left.exists() and missing(cache) == [2]


@pytest.mark.parametrize(
    "key, name",
    [
        ("data", "other token files"),
        ("teacher", "another teacher"),
        ("sae", "another SAE"),
        ("layer", "another block of the teacher"),
        ("label_topk", "another number of labels a token"),
        ("seq_len", "another window length"),
        ("dtype", "a teacher in another precision"),
    ],
)
def test_labels_made_from_something_else_are_refused_by_name(tmp_path, key, name):
    new_cache(tmp_path)
    other, value = {**FINGERPRINTS, key: "other"}, FINGERPRINTS[key]
    values = "" if len(value) == 64 else rf" \({value}, not other\)"  # hashes say nothing
    for use in (lambda: new_cache(tmp_path, fingerprints=other), lambda: LabelCache.open(tmp_path).require(other)):
        with pytest.raises(CocomixError, match=f"{tmp_path} was made from {name}{values}: run `cocomix labels`"):
            use()


def test_everything_that_differs_is_named(tmp_path):
    new_cache(tmp_path)
    with pytest.raises(CocomixError, match=r"another SAE and another window length \(6, not 7\)"):
        LabelCache.open(tmp_path).require({**FINGERPRINTS, "sae": "x", "seq_len": "7"})


def test_a_missing_and_a_broken_description_are_named(tmp_path):
    with pytest.raises(CocomixError, match=f"the label cache {tmp_path} is missing"):
        LabelCache.open(tmp_path)
    new_cache(tmp_path)
    meta = read_json(tmp_path / "meta.json", "meta")
    for content, message in [
        ({**meta, "version": 99}, "has version 99, expected 2"),
        (
            {key: value for key, value in meta.items() if key != "shard_windows"},
            "missing required field `shard_windows`",
        ),
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
    GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=3, n_head=2, n_positions=32)).save_pretrained(
        folder / "model"
    )
    autoencoder().save(folder / "sae")
    return folder


def data_config(folder):
    return DataConfig(
        folder=str(folder / "data"),
        text=[str(folder / "text")],
        vocab_size=VOCABULARY,
        val_fraction=0.2,
        seq_len=SEQ_LEN,
    )


@pytest.fixture
def config(frozen, tmp_path, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    teacher = TeacherConfig(model=str(frozen / "model"), sae=str(frozen / "sae"), layer=LAYER, label_topk=4)
    return Config(
        data=data_config(frozen),
        teacher=teacher,
        concept_labels=ConceptLabelsConfig(cache=str(tmp_path / "cache"), shard_windows=7),
    )


def online(config):
    """Labels of every training window, straight from the teacher, and the windows."""
    split = prepare(config.data).split("train")
    ids = np.stack([split.window(index, SEQ_LEN) for index in range(split.n_windows(SEQ_LEN))])
    teacher = ConceptTeacher.from_config(config.teacher, torch.device("cpu"))
    return np.concatenate([teacher.labels(torch.from_numpy(part)).numpy() for part in np.array_split(ids, 5)]), split


def assert_complete(config):
    expected, split = online(config)
    cache = LabelCache.open(config.concept_labels.cache)
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
    config.model.concept_dim = 4096
    config.teacher.model = None  # whose fingerprint is compared where there is one
    supervision = Supervision.from_config(config, TokenFiles.open(config.data.folder), torch.device("cpu"))
    item = WindowDataset(split, SEQ_LEN, supervision)[3]
    assert np.array_equal(item["concept_labels"].numpy(), cache.window(3))


class Stopped(Exception):
    pass


def stop_writing_after(monkeypatch, shards):
    """Let a process write so many shards, begin one more and be stopped."""
    writer, begun = LabelCache.writer, []

    def stopping(self, shard):
        begun.append(shard)
        if len(begun) > shards:
            raise Stopped
        return writer(self, shard)

    monkeypatch.setattr(LabelCache, "writer", stopping)


def as_rank(monkeypatch, rank, world):
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_ranks_fill_the_cache_together_whichever_is_first(config, monkeypatch, order):
    for rank in order:
        as_rank(monkeypatch, rank, 3)
        run(config)
    assert_complete(config)


def test_ranks_that_work_at_the_same_time_share_the_shards_evenly(config, monkeypatch):
    """Three ranks in three threads, each waiting with every shard until the others have begun one."""
    config.concept_labels.shard_windows = 13
    n_shards = -(-TokenFiles.open(config.data.folder).split("train").n_windows(SEQ_LEN) // 13)
    assert n_shards % 3 == 0 and n_shards > 6
    number, all_at_work = threading.local(), threading.Barrier(3)
    teachers = [ConceptTeacher.from_config(config.teacher, torch.device("cpu")) for _ in range(3)]
    writer, made = LabelCache.writer, {0: [], 1: [], 2: []}

    @contextlib.contextmanager
    def together(self, shard):
        with writer(self, shard) as write:
            made[number.rank].append(shard)
            all_at_work.wait(timeout=20)
            yield write

    def work(rank):
        number.rank = rank
        run(config)

    with monkeypatch.context() as patch:
        patch.setattr(LabelCache, "writer", together)
        patch.setattr("cocomix.teacher.extraction.rank_and_world", lambda: (number.rank, 3))
        patch.setattr(ConceptTeacher, "from_config", lambda *_: teachers[number.rank])
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
        [thread.start() for thread in threads]
        [thread.join(60) for thread in threads]
    assert_complete(config)
    assert made == {rank: list(range(rank, n_shards, 3)) for rank in range(3)}


@pytest.mark.parametrize("alive", [0, 1, 2])
def test_the_share_of_ranks_that_died_is_made_by_those_that_live(config, monkeypatch, capsys, alive):
    as_rank(monkeypatch, (alive + 1) % 3, 3)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_writing_after(patch, 1)
        run(config)
    capsys.readouterr()
    as_rank(monkeypatch, alive, 3)
    run(config)
    assert "is complete" in capsys.readouterr().out
    assert_complete(config)


def test_a_cache_that_was_begun_by_more_ranks_is_finished_by_fewer(config, monkeypatch):
    for rank, world in ((0, 4), (3, 4), (1, 2)):
        as_rank(monkeypatch, rank, world)
        with monkeypatch.context() as patch, pytest.raises(Stopped):
            stop_writing_after(patch, 1)
            run(config)
    as_rank(monkeypatch, 0, 1)
    run(config)
    assert_complete(config)


def test_shards_that_another_process_is_at_are_left_to_it(config, monkeypatch, capsys):
    as_rank(monkeypatch, 1, 2)
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_writing_after(patch, 0)
        run(config)
    left = Path(config.concept_labels.cache, ".labels-000003.bin.0123abcd.4711.part")
    left.write_bytes(b"half")
    capsys.readouterr()
    as_rank(monkeypatch, 0, 2)
    run(config)
    cache = LabelCache.open(config.concept_labels.cache)
    assert f"still lacks 1 of {cache.n_shards} shards: other processes are at work on them" in capsys.readouterr().out
    assert missing(cache) == [3]
    as_rank(monkeypatch, 1, 2)
    run(config)  # its own share it makes without looking
    assert "is complete" in capsys.readouterr().out
    assert_complete(config)


def damage_two(cache):
    os.truncate(cache.folder / "labels-000000.bin", 50)
    flip_a_bit(cache.folder / "labels-000003.bin", 70)


def test_damage_is_found_named_and_mended_by_running_again(config, capsys):
    run(config)
    cache = LabelCache.open(config.concept_labels.cache)
    damage_two(cache)
    sound = {path.name: path.stat().st_mtime_ns for path in cache.folder.iterdir()}
    capsys.readouterr()
    run(config)
    out = capsys.readouterr().out
    assert f"shard 0 of {cache.folder} has 50 bytes, expected " in out
    assert f"shard 3 of {cache.folder} is damaged (its checksum does not hold): it is made anew" in out
    assert "is complete" in out
    assert_complete(config)
    changed = [path.name for path in cache.folder.iterdir() if path.stat().st_mtime_ns != sound[path.name]]
    assert sorted(changed) == ["labels-000000.bin", "labels-000003.bin"]


def test_a_second_run_reads_every_shard_once_over_all_ranks(config, monkeypatch):
    run(config)
    read, damage = [], LabelCache.damage
    monkeypatch.setattr(LabelCache, "damage", lambda self, shard: read.append(shard) or damage(self, shard))
    monkeypatch.setattr(ConceptTeacher, "labels", None)
    n_shards = LabelCache.open(config.concept_labels.cache).n_shards
    for rank in range(3):
        as_rank(monkeypatch, rank, 3)
        run(config)
        assert read == list(range(rank, n_shards, 3))
        read.clear()


def test_a_stopped_command_goes_on_where_it_stopped(config, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_writing_after(patch, 2)
        run(config)
    times = {path.name: path.stat().st_mtime_ns for path in os.scandir(config.concept_labels.cache)}
    assert len(times) == 3
    run(config)
    assert_complete(config)
    later = {path.name: path.stat().st_mtime_ns for path in os.scandir(config.concept_labels.cache)}
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
    config.concept_labels.cache = None
    with pytest.raises(CocomixError, match=r"concept_labels\.cache is not set"):
        run(config)


def test_windows_beyond_the_teachers_context_are_refused(config):
    config.data.seq_len = 33
    with pytest.raises(CocomixError, match="windows of 33 tokens"):
        run(config)


def test_more_latents_than_a_cache_can_number_are_refused(config, tmp_path):
    for latents, problem in ((65_535, None), (65_536, "has 65536 latents, but a label cache numbers at most 65535")):
        decoder = torch.randn(latents, 16)
        sae = SparseAutoencoder(decoder.clone(), torch.zeros(latents), torch.zeros(16), decoder, 4, normalize=True)
        sae.save(tmp_path / str(latents))
        config.teacher.sae, config.concept_labels.cache = (
            str(tmp_path / str(latents)),
            str(tmp_path / f"cache{latents}"),
        )
        with pytest.raises(CocomixError, match=problem) if problem else contextlib.nullcontext():
            run(config)
        assert Path(config.concept_labels.cache).exists() == (problem is None)


def test_the_first_rank_alone_loads_the_teacher_to_compare_it_with_the_cache(config, monkeypatch):
    run(config)
    config.model.concept_dim = ConceptTeacher.from_config(config.teacher, torch.device("cpu")).sae.n_latents
    tokens, loaded, load = TokenFiles.open(config.data.folder), [], ConceptTeacher.from_config
    monkeypatch.setattr(ConceptTeacher, "from_config", lambda *args: loaded.append(args) or load(*args))
    for rank in (1, 0):
        as_rank(monkeypatch, rank, 2)
        assert len(loaded) == 0
        assert Supervision.from_config(config, tokens, torch.device("cpu")).kind(CONCEPT_LABELS) == "cached"
    assert len(loaded) == 1
    config.teacher.layer = 2
    as_rank(monkeypatch, 1, 2)
    with pytest.raises(CocomixError, match="another block of the teacher"):
        Supervision.from_config(config, tokens, torch.device("cpu"))


@pytest.mark.parametrize("position", [0, 70_000, 139_999])
def test_a_changed_label_is_found_by_the_windows_of_its_block(tmp_path, position):
    shape = {"n_windows": 20, "seq_len": 500, "label_topk": 7, "shard_windows": 20}
    cache = new_cache(tmp_path, **shape)
    labels = np.random.default_rng(0).integers(-1, 65535, (20, 500, 7))
    cache.append(0, labels)
    flip_a_bit(tmp_path / "labels-000000.bin", position)
    opened, block = LabelCache.open(tmp_path), position // BLOCK_BYTES
    for index in range(20):
        touched = range(7000 * index // BLOCK_BYTES, (7000 * index + 6999) // BLOCK_BYTES + 1)
        if block in touched:
            with pytest.raises(
                CocomixError, match=r"labels-000000\.bin is damaged: the checksum of bytes .*cocomix lab"
            ):
                opened.window(index)
        else:
            assert np.array_equal(opened.window(index), labels[index])


def test_a_shard_of_another_cache_is_refused(tmp_path):
    labels = random_labels()
    for name, sae in (("own", "s"), ("other", "o")):
        cache = new_cache(tmp_path / name, fingerprints={**FINGERPRINTS, "sae": sae * 64})
        fill(cache, labels)
    os.replace(tmp_path / "other/labels-000001.bin", tmp_path / "own/labels-000001.bin")
    cache = LabelCache.open(tmp_path / "own")
    assert np.array_equal(cache.window(0), labels[0])
    for read in (lambda: cache.window(4), cache.verify):
        with pytest.raises(CocomixError, match=r"labels-000001\.bin was not made from what meta\.json says"):
            read()


def test_a_cache_of_version_1_is_read_and_completed_as_it_was_begun(tmp_path, capsys):
    labels = random_labels()
    fill(new_cache(tmp_path), labels)
    change_json(tmp_path / "meta.json", {"version": 1})
    old = LabelCache.open(tmp_path)
    assert capsys.readouterr().err.count("damage in it may go unnoticed") == 1
    for path in tmp_path.glob("labels-*.bin"):
        path.unlink()
    fill(old, labels)
    sizes = [(tmp_path / f"labels-{shard:06d}.bin").stat().st_size for shard in range(3)]
    assert sizes == [windows * 6 * 3 * 2 + 32 for windows in (4, 4, 2)]
    old.verify()
    assert all(np.array_equal(LabelCache.open(tmp_path).window(index), labels[index]) for index in range(10))


def test_a_shard_that_is_mapped_anew_is_not_compared_again(tmp_path, monkeypatch):
    labels = random_labels()
    fill(new_cache(tmp_path), labels)
    cache = LabelCache.open(tmp_path)
    for index in range(10):
        cache.window(index)
    cache._map.cache_clear()
    monkeypatch.setattr("cocomix.core.mapped_file.MappedFile.bytes_from", None)  # what follows the numbers is not read
    assert all(np.array_equal(cache.window(index), labels[index]) for index in range(10))
