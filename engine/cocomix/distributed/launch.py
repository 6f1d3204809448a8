"""What launchers announce to each process, and how the processes find each other: whatever fails says so in one line.

RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are what torchrun and the deepspeed launcher set, and what a
SLURM script sets from SLURM's own variables. Without them a process is alone.
"""

import contextlib
import os
import re
import socket
import sys
import time

import psutil

from cocomix.core.errors import CocomixError

_QUIET_S = 10.0  # a process that waits longer for the first one says so
_RETRY_S = 1.0
_BY_LAUNCHER = "torchrun and deepspeed set it; configs/launch/slurm.md shows how to set it yourself"

# What others call the number of processes, a process's number, and that on its machine
_OTHERS = (
    ("SLURM", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    ("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MVAPICH2", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("MPI", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)


def announced_ranks() -> tuple[int, int]:
    """This process's number and the number of processes; 0 and 1 where no launcher announced any.

    Raises `CocomixError` for numbers that cannot be.
    """
    if "RANK" not in os.environ:
        world = _number("WORLD_SIZE", 1)
        if world != 1:
            raise CocomixError(f"WORLD_SIZE is {world} but RANK is not set: {_BY_LAUNCHER}, or unset WORLD_SIZE")
        _require_alone()
        return 0, 1
    rank, world = _number("RANK"), _number("WORLD_SIZE")
    if not 0 <= rank < world:
        raise CocomixError(
            f"RANK is {rank} and WORLD_SIZE {world}: give every process its own RANK from 0 to "
            "WORLD_SIZE - 1, and all of them the same WORLD_SIZE"
        )
    return rank, world


def _require_alone() -> None:
    """Raise `CocomixError` where SLURM or MPI has started several processes: each would take itself for the only one.

    SLURM says so in the batch script too, where training alone on an allocation for many would be a mistake as well.
    """
    for system, size, number, local in _OTHERS:
        if os.environ.get(size, "1").isdecimal() and int(os.environ.get(size, "1")) > 1 and number in os.environ:
            raise CocomixError(
                f"{system} has {os.environ[size]} processes, of which this is number {os.environ[number]}, but RANK is "
                f"not set: set RANK=${number} WORLD_SIZE=${size} LOCAL_RANK=${local} in each of them, and the same "
                f"MASTER_ADDR and MASTER_PORT in all (configs/launch/slurm.md); or unset {size} for one that is alone"
            )


def announced_local_rank() -> int:
    """This process's number among those on its machine, which is the number of its GPU.

    Raises `CocomixError` where it is not announced though there are several processes, or cannot be.
    """
    number = _number("LOCAL_RANK", None if announced_ranks()[1] > 1 else 0)
    if number < 0:
        raise CocomixError(f"LOCAL_RANK is {number}; number the processes of a machine from 0")
    return number


def announced_master() -> tuple[str, int]:
    """Host and port where the first process waits for the others. Raises `CocomixError` where they are not announced
    or cannot be."""
    host = os.environ.get("MASTER_ADDR", "")
    if not host:
        raise CocomixError(f"MASTER_ADDR is not set, though RANK is: name the host of rank 0 there ({_BY_LAUNCHER})")
    port = _number("MASTER_PORT")
    if not (0 < port < 65536 or (port == 0 and announced_ranks()[1] == 1)):  # 0: any that is free
        raise CocomixError(f"MASTER_PORT is {port}; it must be a port from 1 to 65535, the same for all processes")
    return host, port


def _number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise CocomixError(f"{name} is not set: {_BY_LAUNCHER}")
    try:
        return int(text)
    except ValueError:
        raise CocomixError(f"{name} is {text!r}, which is not a number: {_BY_LAUNCHER}") from None


@contextlib.contextmanager
def alone_unless_announced():
    """Where no launcher has set the variables: for the length of the block, those of a process that is alone."""
    announced_ranks()  # raises where they are announced in part
    if "RANK" in os.environ:
        yield
        return
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
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


@contextlib.contextmanager
def meeting(seconds: float):
    """For the block in which processes join into a group: wait until the first one can be reached, for `seconds` at
    most, and raise `CocomixError` for whatever keeps them from joining.

    PyTorch would wait as long, but prints a stack for every attempt. Sets GLOO_SOCKET_IFNAME where it is needed.
    """
    rank, world = announced_ranks()
    host, port = announced_master()
    if rank > 0:
        _wait_for_first(host, port, seconds)
    if world > 1:
        _choose_interface(host)
    try:
        yield
    except RuntimeError as error:  # torch.distributed.DistError is one; gloo raises plain ones
        raise CocomixError(_explanation(str(error), rank, world, f"{host}:{port}", seconds)) from error


def _wait_for_first(host, port, seconds):
    start, pause, told = time.monotonic(), min(_RETRY_S, seconds / 10), False
    while True:
        waited = time.monotonic() - start
        try:
            socket.create_connection((host, port), timeout=max(_RETRY_S, seconds - waited)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        waited = time.monotonic() - start
        if waited >= seconds:
            raise CocomixError(
                f"rank 0 cannot be reached at {host}:{port} ({reason}; tried for {_duration(seconds)}): check "
                "MASTER_ADDR and MASTER_PORT, that rank 0 was started there, and that no firewall lies between"
            )
        if waited >= min(_QUIET_S, seconds / 2) and not told:
            told = True
            print(f"waiting for rank 0 at {host}:{port} ({reason})", file=sys.stderr, flush=True)
        time.sleep(pause)


def _choose_interface(host: str) -> None:
    """Let gloo use the network interface that leads to rank 0, unless one is named in GLOO_SOCKET_IFNAME.

    Left to itself gloo takes the address that the machine's own name stands for, which on many systems is the
    loopback's, and then no other machine can connect.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 1))  # sends nothing
        own = probe.getsockname()[0]
        names = [name for name, addresses in psutil.net_if_addrs().items() if own in {a.address for a in addresses}]
        if names and not own.startswith("127."):
            os.environ["GLOO_SOCKET_IFNAME"] = names[0]


def _explanation(error: str, rank: int, world: int, master: str, seconds: float) -> str:
    """What went wrong while joining and what to do, from what PyTorch or gloo said."""
    first_line = error.strip().splitlines()[0] if error.strip() else "no reason given"
    port = master.rpartition(":")[2]
    if re.search(r"EADDRINUSE|address already in use", error, re.IGNORECASE):
        return (
            f"port {port} is in use on this machine: set another MASTER_PORT for all processes (torchrun and "
            "deepspeed: --master_port), or end the run that has it"
        )
    joined = re.search(r"(\d+)/(\d+) clients joined", error)
    if joined:
        return (
            f"only {joined[1]} of {world} processes came within {_duration(seconds)}: start the others with this "
            f"MASTER_ADDR and MASTER_PORT ({master}), and look into their output"
        )
    if rank == 0 and re.search(r"while trying to connect|Ping failed", error):
        return f"rank 0 does not reach itself at {master}: MASTER_ADDR must name the machine that rank 0 runs on"
    return (
        f"the processes cannot join ({first_line}): name the network interface between the machines in "
        "GLOO_SOCKET_IFNAME (`ip -brief address` lists them), and look into the output of the other processes"
    )


def _duration(seconds: float) -> str:
    return f"{seconds / 60:g} minutes" if seconds >= 120 else f"{seconds:g} s"
