import pytest
import torch

from cocomix.core.config import Config, DataConfig, TrainConfig
from cocomix.core.errors import CocomixError, NotFiniteError
from cocomix.distributed.ranks import Ranks
from cocomix.training.save_policy import SavePolicy


class Writer:
    """A `CheckpointWriter` whose save fails where it is told to, with an error of its own or a given one."""

    def __init__(self):
        self.begun, self.fails = [], False

    @property
    def has_failed(self):
        return bool(self.fails)

    def begin(self, engine, step, trainer_state):
        self.begun.append((step, trainer_state))

    def finish(self):
        error, self.fails = self.fails, False
        if error:
            raise error if isinstance(error, CocomixError) else CocomixError("no room")


@pytest.fixture
def policy(tmp_path, monkeypatch):
    """A function that makes a policy of a run of twelve steps, with a writer that touches no disk."""
    monkeypatch.setattr("cocomix.training.save_policy.CheckpointWriter", lambda *_: Writer())

    def make(**train):
        train = TrainConfig(run=str(tmp_path / "run"), tokens=12 * 8 * 4, global_batch=8, save_every=4, **train)
        return SavePolicy(None, Config(data=DataConfig(seq_len=4), train=train), None, Ranks(0, 1, torch.device("cpu")))

    return make


def test_saves_are_due_every_so_many_steps_at_the_end_and_where_the_run_stops(policy):
    saves = policy()
    assert [step for step in range(1, 13) if saves.is_due(step, was_skipped=False, stops=False)] == [4, 8, 12]
    assert [step for step in range(1, 13) if saves.is_due(step, was_skipped=True, stops=False)] == [12]
    assert saves.is_due(5, was_skipped=True, stops=True)


def test_the_last_step_must_have_been_saved(policy):
    saves = policy()
    saves.begin(4, {"elapsed_s": 1.0})
    assert saves._writer.begun == [(4, {"elapsed_s": 1.0})] and saves.saved_step == 4
    saves.require_saved(4)
    with pytest.raises(CocomixError, match="the last checkpoint of .*run, .* could not be written"):
        saves.require_saved(5)


def test_a_failed_save_ends_the_run(policy):
    for do in (lambda saves: saves.notice_failure(5), lambda saves: saves.begin(8, {})):
        saves = policy()
        saves.begin(4, {})
        saves.notice_failure(5)
        saves._writer.fails = True
        with pytest.raises(CocomixError, match="no room"):
            do(saves)


def test_told_so_it_goes_on_without_a_save_that_failed_and_says_so_once(policy, capsys):
    saves = policy(continue_after_failed_save=True)
    saves.begin(4, {})
    saves._writer.fails = True
    saves.notice_failure(5)
    saves.notice_failure(6)
    assert saves.saved_step is None
    assert capsys.readouterr().err == "step 5: a save failed; training continues without it: no room\n"
    saves.begin(8, {})
    assert saves.saved_step == 8


def test_nothing_goes_on_from_weights_that_are_not_finite(policy):
    saves = policy(continue_after_failed_save=True)
    saves.begin(4, {})
    saves._writer.fails = NotFiniteError("holds numbers that are not finite")
    with pytest.raises(NotFiniteError):
        saves.notice_failure(5)
