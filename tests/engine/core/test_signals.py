import os
import signal

import pytest

from cocomix.core.signals import ENDING, handled


@pytest.fixture(autouse=True)
def not_ignored():
    """Under `nohup` SIGHUP would be."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", ENDING)
def test_a_handler_hears_what_asks_to_end_and_the_others_come_back(number):
    before, heard = signal.getsignal(number), []
    with handled(lambda number, _: heard.append(number)):
        os.kill(os.getpid(), number)
    assert heard == [number] and signal.getsignal(number) is before


def test_one_signal_can_be_left_alone():
    before = signal.getsignal(signal.SIGINT)
    with handled(lambda *_: None, but=signal.SIGINT):
        assert signal.getsignal(signal.SIGINT) is before
