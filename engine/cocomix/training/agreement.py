"""What one rank finds out on its own and all must act on together."""

from cocomix.distributed.ranks import Ranks


def any_rank(flag: bool, ranks: Ranks, step: int, log_every: int) -> bool:
    """Whether `flag` is set on any rank; all ranks ask together.

    Several ranks exchange it on logging steps only, where they wait for each other anyway, so that no other step waits;
    on other steps the answer is False.
    """
    if ranks.world > 1 and step % log_every:
        return False
    return ranks.any(flag)
