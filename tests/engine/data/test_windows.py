"""Windows: every one once an epoch, in an order that follows from seed and step, however many ranks read them."""

import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from cocomix.core.errors import CocomixError
from cocomix.data.token_files import TokenSplit
from cocomix.data.windows import MicroBatchSampler, WindowDataset, WindowOrder, step_windows


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
