"""Requests to stop a run: signals, heard between steps."""

import contextlib
import time

from cocomix.core.signals import handled
from cocomix.distributed.ranks import Ranks
from cocomix.training.agreement import any_rank

_ONE_REQUEST_S = 5  # Ctrl-C reaches a process from the terminal and from its launcher


class StopRequests:
    """Inside the block a signal asks to stop after the step, and one more, a while later, raises KeyboardInterrupt.

    `log_every`: steps between those on which several ranks tell each other that they were asked.
    """

    def __init__(self, ranks: Ranks, log_every: int):
        self._ranks, self._log_every = ranks, log_every
        self._asked_at: float | None = None
        self._handled = contextlib.ExitStack()

    def __enter__(self) -> "StopRequests":
        self._handled.enter_context(handled(self._hear))
        return self

    def __exit__(self, *_) -> None:
        self._handled.close()

    def agreed(self, step: int) -> bool:
        """Whether to stop after step `step`, the same on all ranks; they ask together, after every step."""
        return any_rank(self._asked_at is not None, self._ranks, step, self._log_every)

    def _hear(self, _number, _frame) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now > self._asked_at + _ONE_REQUEST_S:  # asked twice: no more patience for a checkpoint
            raise KeyboardInterrupt
