"""Ranks of `cocomix` forked from a process that has imported everything: a start takes a second instead of eight."""

import ctypes
import gc
import importlib
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

import cocomix.teacher.concept_teacher
import cocomix.teacher.sae
import cocomix.training.trainer  # noqa: F401
from cocomix.cli import main as cocomix_main
from cocomix.distributed.ranks import import_deepspeed

PATIENCE_S = 120  # for what must end by itself


def import_all() -> None:
    """Everything that a start imports, here and for all of them; the compiler comes with DeepSpeed's Muon."""
    import_deepspeed()
    for name in (
        "deepspeed.runtime.zero.muon.muon_optimizer",
        "deepspeed.module_inject.auto_ep_layer",
        "transformers.models.auto.tokenization_auto",
        "cocomix.data.preparation",
        "cocomix.distributed.export",
        "cocomix.inference.concepts",
        "cocomix.inference.evaluate",
        "cocomix.inference.generate",
        "cocomix.report.report",
        "cocomix.report.comparison_file",
        "cocomix.report.measurement_page",
        "cocomix.teacher.extraction",
        "cocomix.teacher.sae_training",
        "matplotlib.pyplot",
        "matplotlib.backends.backend_agg",
        "matplotlib.backends.backend_svg",
    ):
        importlib.import_module(name)
    gc.freeze()  # what is imported is not garbage: the ranks need not look through it
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("this process has threads and must not fork")


def in_a_child(work: Callable[[], object]) -> None:
    """Do what starts threads in a process of its own."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            work()
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("what was to be done in another process has failed there")


class Launch:
    """The ranks of one start of `cocomix ARGUMENTS`; `codes` are the exit codes of those that have ended. Bringing a
    file to the disk takes them `sync_s` longer."""

    def __init__(self, arguments: list[str], n_ranks: int, log: Path, sync_s: float = 0):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.codes: dict[int, int] = {}
        self._pids = {
            rank: _fork(
                arguments,
                log,
                sync_s,
                {
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(n_ranks),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )
            for rank in range(n_ranks)
        }

    def living(self) -> list[int]:
        """Ranks that have not ended."""
        for rank in self._pids.keys() - self.codes.keys():
            pid, status = os.waitpid(self._pids[rank], os.WNOHANG)
            if pid:
                self.codes[rank] = os.waitstatus_to_exitcode(status)
        return sorted(self._pids.keys() - self.codes.keys())

    def failed(self) -> bool:
        """Whether a rank has ended otherwise than well."""
        self.living()
        return any(self.codes.values())

    def send(self, number: int, ranks) -> None:
        """Send a signal to those of `ranks` that live."""
        for rank in set(ranks) & set(self.living()):
            os.kill(self._pids[rank], number)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> None:
        """Wait until all have ended or `until()`, at most so long."""
        deadline = time.monotonic() + seconds
        while self.living() and not until() and time.monotonic() < deadline:
            time.sleep(0.001)

    def end(self, grace_s: float) -> None:
        """End what still lives as torchrun does when one rank has failed: SIGTERM, and SIGKILL a moment later."""
        self.send(signal.SIGTERM, self.living())
        self.wait(grace_s)
        self.send(signal.SIGKILL, self.living())
        self.wait(PATIENCE_S)
        if self.living():
            raise RuntimeError("a process that got SIGKILL does not end")


def _fork(arguments: list[str], log: Path, sync_s: float, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no rank outlives this program
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        tqdm.set_lock(threading.RLock())  # the one that all forks share stays taken where its holder is killed
        sync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(sync_s), sync(descriptor))
        if environment["RANK"] != "0" and arguments[0] == "train":
            _wait_for_port(int(environment["MASTER_PORT"]))
        code = cocomix_main(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _wait_for_port(port: int) -> None:
    """Whoever asks before the first rank is ready asks again a second later."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.005)
