"""Processes: start-up, quiet, agreement and a clean end."""

import contextlib
import importlib
import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
from torch.distributed import distributed_c10d

from cocomix.core.errors import CocomixError
from cocomix.core.extras import needs
from cocomix.distributed.launch import alone_unless_announced, announced_local_rank, announced_ranks, meeting


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, its device, and a group for messages between the hosts
    that works while the devices' own group is busy or stuck."""

    rank: int
    world: int
    device: torch.device
    control: torch.distributed.ProcessGroup | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; all ranks must ask together."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def from_first(self, value):
        """The first rank's `value` (anything that pickles) on every rank; all ranks must ask together."""
        if self.world == 1:
            return value
        values = [value]
        torch.distributed.broadcast_object_list(values, group=self.control)
        return values[0]

    def first_of(self, text: str | None) -> str | None:
        """The text of the lowest rank that has one, None where none has; all ranks must ask together."""
        if self.world == 1:
            return text
        has_one = torch.tensor(self.rank if text is not None else self.world)
        torch.distributed.all_reduce(has_one, torch.distributed.ReduceOp.MIN, group=self.control)
        if has_one == self.world:
            return None
        texts = [text]
        torch.distributed.broadcast_object_list(texts, src=int(has_one), group=self.control)
        return texts[0]

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if self.world > 1:
            torch.distributed.barrier()


def rank_and_world() -> tuple[int, int]:
    """This process's number and the number of processes, as torchrun and the deepspeed launcher announce them.

    Raises `CocomixError` for numbers that cannot be.
    """
    return announced_ranks()


def own_device() -> torch.device:
    """The GPU of this process's local rank, or the CPU. Raises `CocomixError` where there is no such GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = announced_local_rank()
    if local_rank >= torch.cuda.device_count():
        raise CocomixError(
            f"local rank {local_rank} has no GPU: this process sees {torch.cuda.device_count()} of them; start at most "
            "that many processes here, and let each see all of the machine's GPUs"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(timeout_minutes: float):
    """Join the other processes (gloo on CPUs, NCCL on GPUs) and leave them in order.

    Works under torchrun, the deepspeed launcher, or alone. A collective that waits longer than `timeout_minutes`
    raises. The end is a barrier and the group's destruction: without it the interpreter now and then aborts on exit.
    A group that the caller has made is joined and left alone. Raises `CocomixError` where the launcher's variables
    cannot be, and where the processes do not find each other in that time.
    """
    deepspeed = import_deepspeed()
    is_ours = not torch.distributed.is_initialized()
    device, timeout = own_device(), timedelta(minutes=timeout_minutes)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with alone_unless_announced():
        with meeting(timeout.total_seconds()) if is_ours else contextlib.nullcontext():
            deepspeed.init_distributed(
                dist_backend="nccl" if device.type == "cuda" else "gloo",
                timeout=timeout,
                verbose=False,
            )
            control = cast(torch.distributed.ProcessGroup, torch.distributed.new_group(backend="gloo", timeout=timeout))
        ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device, control)
        try:
            yield ranks
            ranks.barrier()
        finally:
            if is_ours:
                # DeepSpeed's own, which also forgets the groups that it keeps in globals.
                deepspeed.comm.destroy_process_group()
            else:
                torch.distributed.destroy_process_group(ranks.control)


def limit_waiting(timeout_minutes: float) -> None:
    """Let collectives of every group wait so long and no longer: DeepSpeed's own groups have PyTorch's half hour."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes), group)


def import_deepspeed():
    """Import DeepSpeed without its chatter and without compiling a CPU operation that it can do without.

    On a CPU DeepSpeed builds a shared-memory collective at start-up: half a minute, fatal without a compiler, and a
    stale lock hangs it for ever. gloo serves as well. Raises `CocomixError` where DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    warnings.filterwarnings("ignore", category=FutureWarning)
    with needs("training", "DeepSpeed", "cocomix[train]"):
        deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        cast(Any, importlib.import_module("deepspeed.comm.torch")).build_shm_op = lambda: None
    return deepspeed
