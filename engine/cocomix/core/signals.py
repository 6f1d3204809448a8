"""Signals that ask a process to end."""

import contextlib
import signal
from collections.abc import Callable, Generator
from types import FrameType

# Ctrl-C; kill, and schedulers; a terminal that is gone; what schedulers are told to send before the time is up
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], object], but: signal.Signals | None = None) -> Generator[None]:
    """Inside, `handler` hears the signals of `ENDING`, except `but`; and SIGHUP not where it is ignored, as `nohup` has
    it."""
    hung_up_is_ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in ENDING if number != but and not (number == signal.SIGHUP and hung_up_is_ignored)]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
