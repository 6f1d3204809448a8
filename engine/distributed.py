"""Processes: start-up, quiet, agreement and a clean end."""

import contextlib
import importlib
import logging
import os
import socket
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch

from cocomix.errors import CocomixError


@dataclass(frozen=True)
class Ranks:
    """This process among all: its number, how many there are, and its device."""

    rank: int
    world: int
    device: torch.device

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
        torch.distributed.broadcast_object_list(values, device=self.device)
        return values[0]

    def barrier(self) -> None:
        """Wait until all ranks have come here."""
        if self.world > 1:
            torch.distributed.barrier()


def rank_and_world() -> tuple[int, int]:
    """This process's number and the number of processes, as torchrun and the deepspeed launcher announce them."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def own_device() -> torch.device:
    """The GPU of this process's local rank, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= torch.cuda.device_count():
        raise CocomixError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; start at most that "
            "many processes here"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(timeout_minutes: float):
    """Join the other processes (gloo on CPUs, NCCL on GPUs) and leave them in order.

    Works under torchrun, the deepspeed launcher, or alone. A collective that waits longer than `timeout_minutes`
    raises. The end is a barrier and the group's destruction: without it the interpreter now and then aborts on exit.
    A group that the caller has made is joined and left alone.
    """
    deepspeed = import_deepspeed()
    is_ours = not torch.distributed.is_initialized()
    device = own_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _announced_ranks():
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=timeout_minutes),
            verbose=False,
        )
        ranks = Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)
        try:
            yield ranks
            ranks.barrier()
        finally:
            if is_ours:
                # DeepSpeed's own, which also forgets the groups that it keeps in globals.
                deepspeed.comm.destroy_process_group()


@contextlib.contextmanager
def _announced_ranks():
    """The variables that launchers set; for the length of the block, those of a process that is alone."""
    if "RANK" in os.environ:
        yield
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(_free_port())}
    before = {name: os.environ.get(name) for name in alone}
    os.environ.update(alone)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def import_deepspeed():
    """Import DeepSpeed without its chatter and without compiling a CPU operation that it can do without.

    On a CPU DeepSpeed builds a shared-memory collective at start-up: half a minute, fatal without a compiler, and a
    stale lock hangs it for ever. gloo serves as well. Raises `CocomixError` where DeepSpeed is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ModuleNotFoundError:
        raise CocomixError("training needs DeepSpeed: pip install 'cocomix[train]'") from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    return deepspeed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
