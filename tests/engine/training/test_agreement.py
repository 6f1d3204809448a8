import torch

from cocomix.distributed.ranks import Ranks
from cocomix.training.agreement import any_rank

CPU = torch.device("cpu")


class Told(Ranks):
    """Two ranks, of which the other one always sets its flag."""

    def any(self, flag):
        return True


def test_one_rank_knows_at_any_step():
    alone = Ranks(0, 1, CPU)
    assert [any_rank(True, alone, step, 10) for step in (1, 10)] == [True, True]
    assert not any_rank(False, alone, 10, 10)


def test_several_ranks_exchange_flags_on_logging_steps_only():
    two = Told(0, 2, CPU)
    assert [any_rank(flag, two, step, 10) for flag in (False, True) for step in (9, 10, 11, 20)] == [
        False, True, False, True, False, True, False, True,
    ]  # fmt: skip
