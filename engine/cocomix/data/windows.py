"""Windows of a token file, in the order in which training reads them.

The order is a pure function of (seed, position): resuming a run needs to know its step and nothing else.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from cocomix.core.errors import CocomixError
from cocomix.data.token_files import TokenSplit


class WindowOrder:
    """The order in which windows are read, in O(1) memory; a pure function of (seed, position).

    Position p lies in epoch p // n_windows, and every epoch is its own pseudo-random permutation: a Feistel network
    over Z_a x Z_b with modular addition (Black and Rogaway 2002), where a * b is just above n_windows, and cycle
    walking for the few values beyond it.
    """

    _ROUNDS = 8

    def __init__(self, n_windows: int, seed: int):
        if n_windows < 1:
            raise ValueError(f"n_windows must be positive, not {n_windows}")
        self.n_windows, self.seed = int(n_windows), int(seed)
        rows = math.isqrt(self.n_windows - 1) + 1
        self._rows, self._columns = np.uint64(rows), np.uint64(-(-self.n_windows // rows))

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """Window indices, int64, of positions >= 0, int64 of any shape."""
        positions = np.asarray(positions, dtype=np.int64)
        if positions.size and positions.min() < 0:
            raise IndexError("positions must not be negative")
        epochs, windows = np.divmod(np.atleast_1d(positions), self.n_windows)
        seed = np.array([self.seed % 2**64], dtype=np.uint64)
        keys = _mix(_mix(seed) + epochs.astype(np.uint64))
        windows = self._permute(windows.astype(np.uint64), keys)
        while (beyond := windows >= self.n_windows).any():
            windows[beyond] = self._permute(windows[beyond], keys[beyond])
        return windows.astype(np.int64).reshape(positions.shape)

    def _permute(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        row, column = np.divmod(values, self._columns)
        for number in range(self._ROUNDS):
            keys = _mix(keys)
            if number % 2 == 0:
                row = (row + _mix(keys ^ column) % self._rows) % self._rows
            else:
                column = (column + _mix(keys ^ row) % self._columns) % self._columns
        return row * self._columns + column


def _mix(x: np.ndarray) -> np.ndarray:
    """The SplitMix64 step: uint64 to uint64, every input bit reaches every output bit."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def step_windows(order: WindowOrder, step: int, global_batch: int) -> np.ndarray:
    """Windows of optimizer step `step` (0-based) over all ranks, int64 [global_batch]."""
    return order[np.arange(step * global_batch, (step + 1) * global_batch)]


class WindowDataset(Dataset):
    """Windows of a split as tensors: `input_ids` int64 [T] and what `supervision` has for them.

    `supervision` is anything with `.window(index)`, which returns arrays [T, ...] by the names of a batch's entries.
    """

    def __init__(self, split: TokenSplit, seq_len: int, supervision=None):
        self.split, self.seq_len, self.supervision = split, seq_len, supervision
        self._length = split.n_windows(seq_len)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        item = {"input_ids": torch.from_numpy(self.split.window(index, self.seq_len))}
        if self.supervision is not None:
            item |= {name: torch.from_numpy(array) for name, array in self.supervision.window(index).items()}
        return item


class MicroBatchSampler(Sampler[list[int]]):
    """Window indices of one rank's micro batches, from `first_step` up to `total_steps`.

    The windows of a step are laid out as [accumulation rounds, ranks, micro_batch], so what a step learns from does
    not depend on how many ranks share it. Raises `CocomixError` when that does not divide `global_batch`.
    """

    def __init__(
        self,
        order: WindowOrder,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        first_step: int,
        total_steps: int,
    ):
        if global_batch % (micro_batch * world_size):
            raise CocomixError(
                f"train.global_batch ({global_batch}) must be a multiple of train.micro_batch ({micro_batch}) x "
                f"{world_size} ranks"
            )
        self.order, self.global_batch, self.micro_batch = order, global_batch, micro_batch
        self.rank, self.world_size = rank, world_size
        self.first_step, self.total_steps = first_step, total_steps

    def __len__(self) -> int:
        rounds = self.global_batch // (self.micro_batch * self.world_size)
        return max(0, self.total_steps - self.first_step) * rounds

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.total_steps):
            windows = step_windows(self.order, step, self.global_batch)
            for micro in windows.reshape(-1, self.world_size, self.micro_batch)[:, self.rank]:
                yield micro.tolist()
