"""Validation loss and perplexity over the windows of a token file."""

import math

import numpy as np
import torch

from cocomix.data.token_files import TokenSplit


@torch.no_grad()
def validation_loss(
    model, split: TokenSplit, seq_len: int, batch: int, device, *, max_windows: int = 0, rank: int = 0, world: int = 1
) -> tuple[torch.Tensor, int]:
    """Sum of the next-token losses (nats, float64 scalar) and number of predictions, over this rank's windows.

    Reads windows rank, rank + world, ... of the first `max_windows` (0: all) windows of `seq_len` tokens. Every rank
    runs the model equally often, also where there are no windows left for it: under ZeRO-3 a forward pass gathers
    weights, which takes all ranks.
    """
    n_windows = min(split.n_windows(seq_len), max_windows or split.n_windows(seq_len))
    mine = range(rank, n_windows, world)
    total = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for start in range(0, -(-n_windows // world), batch):
        part = mine[start : start + batch]
        windows = np.stack([split.window(i, seq_len) for i in part or range(1)])
        ids = torch.from_numpy(windows).to(device)
        out = model(input_ids=ids, labels=ids, use_cache=False)
        if part:
            loss = out.loss if getattr(out, "ntp_loss", None) is None else out.ntp_loss
            total += loss.double() * len(part) * (seq_len - 1)
    model.train(was_training)
    return total, len(mine) * (seq_len - 1)


def perplexity(loss: float) -> float:
    """exp(loss), infinite rather than an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
