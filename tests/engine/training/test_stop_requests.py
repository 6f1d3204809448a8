import os
import signal

import pytest
import torch
from run_helpers import stop_at, uneven

from cocomix.distributed.ranks import Ranks
from cocomix.training.stop_requests import StopRequests

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture
def not_ignored():
    """Under `nohup` SIGHUP would be."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_asks_to_stop_and_the_handlers_come_back(number, not_ignored):
    before = signal.getsignal(number)
    with StopRequests(ALONE, 10) as requests:
        assert not requests.agreed(1)
        os.kill(os.getpid(), number)
        assert requests.agreed(1)
        os.kill(os.getpid(), number)  # at once: the same request
    assert signal.getsignal(number) is before


def test_what_is_ignored_stays_ignored():
    """`nohup` starts a program that way, to let it go on when its terminal closes."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests(ALONE, 10) as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not requests.agreed(1)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_asked_again_later_it_interrupts_and_the_handlers_come_back(monkeypatch):
    monkeypatch.setattr("cocomix.training.stop_requests._ONE_REQUEST_S", 0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), StopRequests(ALONE, 10):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_signals_at_once_are_one_request(world, monkeypatch):
    """Ctrl-C comes from the terminal and from the launcher."""
    stop_at(monkeypatch, step=2, times=2)
    assert world.train("doubled", *uneven(world)) == 75
    assert (world.folder / "doubled/checkpoints/step-00000002/trainer.json").exists()


def test_a_later_second_signal_ends_the_run_without_a_checkpoint(world, monkeypatch, capsys):
    monkeypatch.setattr("cocomix.training.stop_requests._ONE_REQUEST_S", 0)
    stop_at(monkeypatch, step=2, times=2)
    assert world.train("impatient", *uneven(world)) == 130
    assert "with --resume it continues" in capsys.readouterr().err
    assert not (world.folder / "impatient/checkpoints").exists()
