"""Validation perplexity of checkpoints: `cocomix eval CHECKPOINT...`."""

from pathlib import Path
from typing import Any, cast

from cocomix.core.errors import CocomixError
from cocomix.data.token_files import TokenFiles
from cocomix.data.tokenizer import load_tokenizer
from cocomix.distributed.export import description_folder, find_model, load_model, read_model, run_of
from cocomix.distributed.ranks import own_device
from cocomix.teacher.language_model import require_vocabulary
from cocomix.training.run_places import find_data
from cocomix.training.validation import perplexity, validation_loss


def evaluate_checkpoint(checkpoint, data=None, seq_len: int | None = None, batch: int = 8, windows: int = 0) -> float:
    """`cocomix eval`: print and return the validation perplexity of a checkpoint.

    `checkpoint` is a transformers folder, a checkpoint or a run; `data` a folder of token files, by default the one
    that the run was trained on. Raises `CocomixError` where model, data and window length do not fit.
    """
    if batch < 1 or windows < 0:
        raise CocomixError(f"--batch is {batch} and --windows {windows}: expected at least 1 and at least 0 (all)")
    device = own_device()
    find_model(checkpoint)
    tokens = TokenFiles.open(data or _data_of_run(checkpoint))
    model = cast(Any, read_model(checkpoint, lambda folder: _load(folder, tokens))).to(device)
    require_vocabulary(model, tokens)
    context = int(model.config.max_position_embeddings)
    seq_len = context if seq_len is None else seq_len
    if not 2 <= seq_len <= context:
        raise CocomixError(f"--seq-len is {seq_len}: this model takes windows of 2 to {context} tokens")
    total, count = validation_loss(model, tokens.split("val"), seq_len, batch, device, max_windows=windows)
    loss = float(total) / count
    print(
        f"{checkpoint}: validation loss {loss:.4f} nats, perplexity {perplexity(loss):.2f} "
        f"({count:,} predictions in windows of {seq_len} tokens)"
    )
    return perplexity(loss)


def _load(folder: Path, tokens):
    _require_tokenizer(description_folder(folder), tokens)
    return load_model(folder)


def _require_tokenizer(folder: Path, tokens) -> None:
    if not (folder / "tokenizer.json").is_file():
        return
    if load_tokenizer(str(folder)).get_vocab() != tokens.tokenizer().get_vocab():
        raise CocomixError(
            f"{folder} was trained with another tokenizer than the token files in {tokens.folder}: name token files "
            f"with --data that were made with data.tokenizer={folder}"
        )


def _data_of_run(checkpoint) -> str:
    run = run_of(checkpoint)
    folder = None if run is None else find_data(run, "--data")
    if folder is None:
        raise CocomixError(f"{checkpoint} does not lie in the folder of a run: name the token files with --data FOLDER")
    return folder
