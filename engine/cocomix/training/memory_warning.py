"""A warning, before the first step, of GPUs whose memory is predicted not to suffice."""

import sys
from collections.abc import Callable

import torch

from cocomix.core.config import Config
from cocomix.distributed.ranks import Ranks

# What to warn of, if anything, from the config, the vocabulary's size, the number of GPUs and the bytes of each.
MemoryWarning = Callable[[Config, int, int, int], str | None]


def warn_of_memory(memory_warning: MemoryWarning | None, config: Config, vocab_size: int, ranks: Ranks) -> None:
    """Say on standard error what `memory_warning` returns for this run, on the first rank and on GPUs alone."""
    if memory_warning is None or not ranks.is_first or ranks.device.type != "cuda":
        return
    memory_bytes = torch.cuda.get_device_properties(ranks.device).total_memory
    warning = memory_warning(config, vocab_size, ranks.world, memory_bytes)
    if warning:
        print(f"warning: {warning}", file=sys.stderr)
