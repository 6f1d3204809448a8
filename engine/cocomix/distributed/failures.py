"""Ranks that do not fit together, hang or die: said by name, instead of waiting or tracebacks on all others."""

import contextlib
import hashlib
import json
import os
import socket
import threading
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import DistError, DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from cocomix.core.errors import CocomixError
from cocomix.core.locks import only_writer
from cocomix.core.origin import differences
from cocomix.distributed.ranks import Ranks

_ROLL_CALL_S = 20  # the ranks' collectives fail at nearly the same time


def require_agreement(ranks: Ranks, identity: dict) -> None:
    """Raise `CocomixError` on all ranks, naming one that differs and in what, unless all have the same `identity` (JSON
    values by name: settings, fingerprints of data and code). All ranks must call this."""
    if ranks.world == 1:
        return
    text = json.dumps(identity, sort_keys=True, default=str)
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8)
    lowest, highest = digest.clone(), digest.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=ranks.control)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX, group=ranks.control)
    if torch.equal(lowest, highest):
        return
    first = ranks.from_first(identity)
    differing = [
        f"{found.name} is {found.present} and {found.stored} on rank 0" for found in differences(first, identity)
    ]
    message = ranks.first_of(f"on {_this_rank(ranks)} {'; '.join(differing)}" if differing else None)
    raise CocomixError(f"the ranks disagree: {message}. Give all of them the same config, data and code")


@contextlib.contextmanager
def only_writers(ranks: Ranks, folder: str, command: str):
    """Inside, the first rank is the only process that writes `folder`; all ranks must come here together. Raises
    `CocomixError` on all of them where another process does."""
    with contextlib.ExitStack() as held:
        problem = None
        if ranks.is_first:
            try:
                held.enter_context(only_writer(folder, command))
            except CocomixError as error:
                problem = str(error)
        problem = ranks.first_of(problem)
        if problem is not None:
            raise CocomixError(problem)
        yield


def _this_rank(ranks: Ranks) -> str:
    return f"rank {ranks.rank} (host {socket.gethostname()}, process {os.getpid()})"


@contextlib.contextmanager
def failures_named(ranks: Ranks):
    """Raise `CocomixError` where a collective inside the block failed because another rank hangs, naming that one, or
    because it ended, which the launcher reports by name.

    Collectives of gloo raise in the process that waits. NCCL's do not: after the same time PyTorch's watchdog ends the
    process, and its flight recorder's files tell which rank was missing.
    """
    if ranks.world == 1:
        yield
        return
    names: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(names, _this_rank(ranks), group=ranks.control)
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, DistError) or "gloo" in str(error)):
            raise
        if "Timed out" in str(error):
            missing = ", ".join(names[rank] for rank in _missing_ranks(ranks)) or "a rank that answers now"
            raise CocomixError(
                f"{missing} did not come to a collective in time: it hangs. End all processes and start "
                "again with --resume"
            ) from error
        raise CocomixError(
            "another rank ended: its own output, or the launcher's, says which and why. Start again with --resume"
        ) from error


def _missing_ranks(ranks: Ranks) -> list[int]:
    """Who does not answer a roll call. It goes through the store in which the ranks once met, since collectives no
    longer work. A store that itself hangs lives in the first rank, and its calls never return: hence the thread."""
    answers = []
    roll_call = threading.Thread(target=lambda: answers.append(_roll_call(ranks)), daemon=True)
    roll_call.start()
    for _ in range((2 if ranks.is_first else 1) * _ROLL_CALL_S + 5):  # in parts, between which a signal is heard
        roll_call.join(timeout=1)
        if not roll_call.is_alive():
            break
    return answers[0] if answers else [0]


def _roll_call(ranks: Ranks) -> list[int]:
    store, everyone = PrefixStore("roll call", _get_default_store()), range(ranks.world)
    store.set(f"here/{ranks.rank}", "")
    _wait(store, [f"here/{rank}" for rank in everyone])
    missing = [rank for rank in everyone if not store.check([f"here/{rank}"])]
    store.set(f"leaves/{ranks.rank}", "")
    if ranks.is_first:  # the store may live in this process
        _wait(store, [f"leaves/{rank}" for rank in everyone if rank not in missing])
    return missing


def _wait(store, keys: list[str]) -> None:
    with contextlib.suppress(DistStoreError):  # not all in time
        store.wait(keys, timedelta(seconds=_ROLL_CALL_S))
