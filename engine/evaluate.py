"""Validation loss and perplexity over the windows of a token file."""

import math
from pathlib import Path

import numpy as np
import torch

from cocomix.data import TokenSplit
from cocomix.errors import CocomixError
from cocomix.files import read_json
from cocomix.text import load_tokenizer


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


def evaluate_checkpoint(checkpoint, data=None, seq_len: int | None = None, batch: int = 8, windows: int = 0) -> float:
    """`cocomix eval`: print and return the validation perplexity of a checkpoint.

    `checkpoint` is a transformers folder, a checkpoint or a run; `data` a folder of token files, by default the one
    that the run was trained on. Raises `CocomixError` where model, data and window length do not fit.
    """
    from cocomix.data import TokenFiles
    from cocomix.distributed import own_device
    from cocomix.export import description_folder, find_model, load_model
    from cocomix.supervision import require_vocabulary

    if batch < 1 or windows < 0:
        raise CocomixError(f"--batch is {batch} and --windows {windows}: expected at least 1 and at least 0 (all)")
    device = own_device()
    folder = find_model(checkpoint)
    tokens = TokenFiles.open(data or _data_of_run(checkpoint))
    _require_tokenizer(description_folder(folder), tokens)
    model = load_model(folder).to(device)
    require_vocabulary(model, tokens)
    context = model.config.max_position_embeddings
    seq_len = context if seq_len is None else seq_len
    if not 2 <= seq_len <= context:
        raise CocomixError(f"--seq-len is {seq_len}: this model takes windows of 2 to {context} tokens")
    total, count = validation_loss(model, tokens.split("val"), seq_len, batch, device, max_windows=windows)
    loss = float(total) / count
    print(f"{checkpoint}: validation loss {loss:.4f} nats, perplexity {perplexity(loss):.2f} "
          f"({count:,} predictions in windows of {seq_len} tokens)")
    return perplexity(loss)


def _require_tokenizer(folder: Path, tokens) -> None:
    if not (folder / "tokenizer.json").is_file():
        return
    if load_tokenizer(str(folder)).get_vocab() != tokens.tokenizer().get_vocab():
        raise CocomixError(
            f"{folder} was trained with another tokenizer than the token files in {tokens.folder}: name token files "
            f"with --data that were made with data.tokenizer={folder}"
        )


def _data_of_run(checkpoint) -> str:
    for folder in (Path(checkpoint), *Path(checkpoint).absolute().parents):
        if (folder / "run.json").is_file():
            return read_json(folder / "run.json", "the run's description")["config"]["data"]["folder"]
    raise CocomixError(f"{checkpoint} does not lie in the folder of a run: name the token files with --data FOLDER")
