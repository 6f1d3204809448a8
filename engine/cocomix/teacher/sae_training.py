"""Training of TopK sparse autoencoders on a teacher's residual stream: `cocomix sae`.

The recipe is that of "Scaling and evaluating sparse autoencoders" (Gao et al. 2024, arXiv 2406.04093). Everything a
step does follows from its number and the settings, so that a run that was interrupted continues bit for bit.
"""

import contextlib
import dataclasses
import io
import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from cocomix.core.config import Config, SaeConfig
from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_write, require_space, sweep_leftovers
from cocomix.core.locks import only_writer
from cocomix.core.manifest import require_sound
from cocomix.core.origin import differences
from cocomix.core.precision import TEACHER, settled
from cocomix.core.torch_files import load_tensors
from cocomix.data.token_files import TokenFiles
from cocomix.data.windows import WindowOrder
from cocomix.model.pretrained import fingerprint, load_language_model
from cocomix.teacher.language_model import DTYPES, check_head, check_layer, residual_stream
from cocomix.teacher.sae import SparseAutoencoder
from cocomix.teacher.sae_formats import read_saved_config
from cocomix.teacher.sae_metrics import evaluate, firing_counts, losses_under_reconstruction
from cocomix_kernels import topk_linear
from cocomix_kernels.common.chunking import row_chunks

GRAD_CLIP = 1.0
DECAY_SHARE = 0.2  # of the steps, at the end, over which the learning rate falls to zero
BUFFER_BATCHES = 16  # batches' worth of activations that are shuffled together
EVAL_TOKENS = 2**18  # at most so many validation tokens are read
LOSS_TOKENS = 2**15  # and so many go through the whole language model, three times
TEACHER_TOKENS = 8192  # tokens in one forward pass of the teacher
STATE_SECONDS = 30.0  # between two saves of the training state
SHOW_EVERY = 10  # steps between two updates of the progress bar, each of which waits for the device
# Reading k rows a token takes as long as a product with so many times k rows that all tokens share.
_DENSE_LATENTS = 32
_SMOOTHING = 0.95  # of the figures that the progress bar shows


@dataclass
class TrainingState:
    """What an interrupted training needs to go on.

    `silent_tokens` [C] int64: tokens since each latent last fired. `smoothed` [2] fp32: running averages of
    explained variance and L0. `step`: steps that are done.
    """

    sae: SparseAutoencoder
    optimizer: torch.optim.Optimizer
    silent_tokens: Tensor
    smoothed: Tensor
    step: int = 0

    def dead(self, config: SaeConfig) -> Tensor:
        """Indices [n_dead] int64 of the latents that have been silent for `dead_after_tokens`."""
        return (self.silent_tokens >= config.dead_after_tokens).nonzero()[:, 0]


def total_steps(config: SaeConfig) -> int:
    """Optimizer steps of a training: `tokens` in batches of `batch_tokens`, rounded up."""
    return math.ceil(config.tokens / config.batch_tokens)


def new_state(d_model: int, config: SaeConfig, device="cpu") -> TrainingState:
    """The state before the first step: random unit decoder rows, the encoder equal to them, biases zero."""
    generator = torch.Generator().manual_seed(config.seed)
    decoder = F.normalize(torch.randn(config.n_latents, d_model, generator=generator), dim=1)
    sae = SparseAutoencoder(
        decoder.clone(), torch.zeros(config.n_latents), torch.zeros(d_model), decoder, config.k, normalize=True
    ).to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
    silent_tokens = torch.zeros(config.n_latents, dtype=torch.int64, device=device)
    return TrainingState(sae, optimizer, silent_tokens, torch.zeros(2, device=device))


def train_sae(
    activations: Iterable[Tensor],
    d_model: int,
    config: SaeConfig,
    device="cpu",
    *,
    state: TrainingState | None = None,
    after_step: Callable[[TrainingState], None] | None = None,
) -> tuple[SparseAutoencoder, dict]:
    """Train an SAE on raw activations.

    `activations` yields batches [n, d_model]; the first one belongs to step `state.step` (0 without a state), and as
    many are read as steps are missing. `after_step` sees the state after every step. Returns the SAE and metrics of
    the last part of training: explained_variance and l0 (running averages), dead_share (latents silent for
    `dead_after_tokens`, or for the whole training where that is shorter) and tokens. Raises `CocomixError` when the
    loss stops being finite and `ValueError` when `activations` ends too soon.
    """
    steps = total_steps(config)
    state = state or new_state(d_model, config, device)
    tokens = state.step * config.batch_tokens
    with tqdm(
        total=steps * config.batch_tokens, initial=tokens, desc="sae", unit="tok", unit_scale=True, disable=None
    ) as bar:
        for batch in itertools.islice(activations, steps - state.step):
            train_step(state, batch.to(device), config)
            tokens += len(batch)
            if state.step % SHOW_EVERY == 0 or state.step == steps:
                bar.set_postfix(_rounded(_metrics(state, config)), refresh=False)
            bar.update(len(batch))
            if after_step is not None:
                after_step(state)
    if state.step < steps:
        raise ValueError(f"activations ended after step {state.step} of {steps}")
    return state.sae, {**_metrics(state, config), "tokens": tokens}


def train_step(state: TrainingState, x: Tensor, config: SaeConfig) -> None:
    """One optimizer step on raw activations x [n, d]."""
    sae, optimizer = state.sae, state.optimizer
    with torch.no_grad():
        x_hat = sae.normalize(x)[0]
        if state.step == 0:
            sae.pre_bias.copy_(x_hat.mean(0))
    optimizer.param_groups[0]["lr"] = config.lr * _lr_factor(state.step, config)
    optimizer.zero_grad()
    loss, unexplained, fired = sae_loss(sae, x_hat, state.dead(config), config)
    loss.backward()
    with torch.no_grad():
        decoder, gradient = sae.decoder, cast(Tensor, sae.decoder.grad)
        # Movement along a row would be undone by the renormalisation, but would count in Adam's moments.
        gradient -= (gradient * decoder).sum(1, keepdim=True) * decoder
        torch.nn.utils.clip_grad_norm_(sae.parameters(), GRAD_CLIP)
        optimizer.step()
        decoder.copy_(F.normalize(decoder, dim=1))
        state.silent_tokens.add_(len(x)).masked_fill_(fired > 0, 0)
        figures = torch.stack([1 - unexplained, fired.sum() / len(x)])
        state.smoothed = figures if state.step == 0 else torch.lerp(figures, state.smoothed, _SMOOTHING)
    state.step += 1


def sae_loss(sae: SparseAutoencoder, x_hat: Tensor, dead: Tensor, config: SaeConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised mean squared error plus `aux_weight` times AuxK, on normalised inputs x_hat [n, d].

    AuxK: the `aux_k` strongest of the `dead` latents [n_dead] reconstruct what the others left over, normalised
    alike (appendix A.2 of the source). Returns the loss, its first part (the unexplained share of the variance,
    detached) and how often each latent fired [C], fp32.
    """
    values, indices = sae.encode_normalized(x_hat)
    reconstruction = sae.decode(values, indices)
    unexplained = _normalized_mse(reconstruction, x_hat)
    loss = unexplained
    aux_k = min(config.aux_k, len(dead))
    if aux_k > 0:
        left_over = (x_hat - reconstruction).detach()
        aux = _strongest_of(dead, sae, x_hat - sae.pre_bias, aux_k)
        loss = loss + config.aux_weight * _normalized_mse(aux, left_over)
    return loss, unexplained.detach(), firing_counts(values.detach(), indices, sae.n_latents)


def _strongest_of(dead: Tensor, sae: SparseAutoencoder, x: Tensor, k: int) -> Tensor:
    """What the k largest of the `dead` latents [n_dead] give for x [n, d], without pre_bias: [n, d]."""
    encoder, bias, decoder = sae.W_enc[dead], sae.latent_bias[dead], sae.decoder[dead]
    if len(dead) > _DENSE_LATENTS * k:
        values, indices = topk_linear(x, encoder, bias, k, relu=True)
        return F.embedding_bag(indices, decoder, per_sample_weights=values, mode="sum")
    parts = [
        checkpoint(_dense_topk, x[rows], encoder, bias, decoder, k, use_reentrant=False)
        for rows in row_chunks(len(x), 16 * len(dead), x.device)
    ]
    return torch.cat(parts)


def _dense_topk(x, encoder, bias, decoder, k):
    pre = F.linear(x, encoder, bias)
    kept = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, kept.indices, kept.values.relu()) @ decoder


def _normalized_mse(prediction: Tensor, target: Tensor) -> Tensor:
    return (prediction - target).square().sum() / (target - target.mean(0)).square().sum()


def _lr_factor(step: int, config: SaeConfig) -> float:
    steps = total_steps(config)
    warmup = (step + 1) / max(1, config.warmup_steps)
    decay = (steps - step) / max(1.0, DECAY_SHARE * steps)
    return min(1.0, warmup, decay)


def _metrics(state: TrainingState, config: SaeConfig) -> dict[str, float]:
    explained, l0 = state.smoothed.tolist()
    if not math.isfinite(explained):
        raise CocomixError(
            f"the SAE's loss is not finite any more at step {state.step}: lower sae.lr or raise "
            "sae.warmup_steps, and check that the teacher's activations are finite"
        )
    horizon = min(config.dead_after_tokens, state.step * config.batch_tokens)
    dead = (state.silent_tokens >= horizon).float().mean().item()
    return {"explained_variance": explained, "l0": l0, "dead_share": dead}


def _rounded(metrics: dict) -> dict[str, str]:
    return {name: f"{value:.3g}" for name, value in metrics.items()}


def shuffled_batches(
    read_block: Callable[[int], Tensor], block_tokens: int, batch_tokens: int, seed: int, start_step: int = 0
) -> Iterator[Tensor]:
    """Endless batches [batch_tokens, d] from blocks that are shuffled one at a time.

    `read_block(b)` returns block b, [block_tokens, d]. Batch s is a function of s and `seed` alone: an iterator
    that starts at `start_step` continues where one that started at 0 would be. No row is left out.
    """
    first, offset = divmod(start_step * batch_tokens, block_tokens)
    pieces, wanted = [], batch_tokens
    for index in itertools.count(first):
        block = read_block(index)
        order = np.random.default_rng([seed % 2**64, index]).permutation(block_tokens)
        order = torch.from_numpy(order).to(block.device)
        while offset < block_tokens:
            rows = order[offset : offset + wanted]
            pieces.append(block[rows])
            offset += len(rows)
            wanted -= len(rows)
            if wanted == 0:
                yield torch.cat(pieces)
                pieces, wanted = [], batch_tokens
        offset = 0


def save_state(path, state: TrainingState, identity: dict) -> None:
    """Write the state to `path`, atomically, readable with `weights_only=True`. `identity`: what is being trained."""
    content = {
        "identity": json.dumps(identity, sort_keys=True),
        "step": state.step,
        "sae": state.sae.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "silent_tokens": state.silent_tokens,
        "smoothed": state.smoothed,
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with atomic_write(path) as file:
        file.write(buffer.getbuffer())


def load_state(path, d_model: int, config: SaeConfig, device, identity: dict) -> TrainingState | None:
    """The state that `save_state` wrote; None when there is none or it belongs to a training of other identity.

    Raises `CocomixError` for a file that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        return None
    state = new_state(d_model, config, device)
    with _explain_damage(path):
        content = load_tensors(path, device)
        if content["identity"] != json.dumps(identity, sort_keys=True):
            return None
        state.sae.load_state_dict(content["sae"])
        state.optimizer.load_state_dict(content["optimizer"])
        state.silent_tokens, state.smoothed = content["silent_tokens"], content["smoothed"]
        state.step = content["step"]
    return state


def _identity_of_state(path: Path) -> dict:
    """The identity that `save_state` wrote. Raises `CocomixError` for a file that cannot be read."""
    with _explain_damage(path):
        return json.loads(load_tensors(path, "meta")["identity"])


@contextlib.contextmanager
def _explain_damage(path: Path):
    """Turn what a damaged training state raises into a `CocomixError`."""
    try:
        yield
    except Exception as error:  # torch.load promises no common base
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CocomixError(f"the training state {path} cannot be read: {reason}; delete it to start afresh") from None


def run(config: Config) -> dict:
    """`cocomix sae`: train an SAE on block `teacher.layer` of `teacher.model` and save it to `teacher.sae`.

    Returns the metrics on the validation split (those of `sae_metrics`). Continues from `<teacher.sae>.partial.pt`
    where an earlier run of the same settings, teacher and data was interrupted; returns at once when that SAE is
    already there. Raises `CocomixError` for settings that do not fit the teacher or the data, and for a
    `teacher.sae` that holds anything else.
    """
    folder = _output_folder(config)
    tokens = TokenFiles.open(config.data.folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, notes = settled(config, device.type, lambda _: _begun_with(folder))
    if TEACHER in notes:
        print(notes[TEACHER])
    model = cast(Any, load_language_model(config.teacher.model)).to(device, DTYPES[config.teacher.dtype]).eval()
    _check_teacher(model, tokens, config)
    identity = _identity(config, model, tokens)
    stream = _ResidualStream(model, tokens, config, device)
    with only_writer(folder, "cocomix sae"):
        metrics = _finished_metrics(folder, identity)
        if metrics is not None:
            _partial_path(folder).unlink(missing_ok=True)  # a kill may have come between the last save and this
            print(f"{folder} already holds this SAE: {_summary(metrics)}")
            return metrics
        for leftover in (folder, _partial_path(folder)):
            sweep_leftovers(leftover.parent, leftover.name)
        state = _train(config, stream, folder, identity, device)
        horizon = min(config.sae.dead_after_tokens, state.step * config.sae.batch_tokens)
        metrics = evaluate(state.sae, stream.validation(), state.silent_tokens >= horizon)
        metrics |= losses_under_reconstruction(model, config.teacher.layer, state.sae, stream.validation_windows())
        state.sae.save(folder, metrics=metrics, training=identity)
        _partial_path(folder).unlink(missing_ok=True)
    print(f"{folder}: {_summary(metrics)}")
    return metrics


def _train(config: Config, stream: "_ResidualStream", folder: Path, identity: dict, device) -> TrainingState:
    partial = _partial_path(folder)
    state = load_state(partial, stream.d_model, config.sae, device, identity)
    if state is not None:
        print(f"going on from {partial} at step {state.step} of {total_steps(config.sae)}")
    elif partial.exists():
        print(f"{partial} belongs to other settings: starting afresh")
    state = state or new_state(stream.d_model, config.sae, device)
    n_bytes = sum(parameter.nbytes for parameter in state.sae.parameters())
    require_space(partial, 7 * n_bytes)  # weights and two moments, old file beside new, then the SAE itself
    saved_at = time.monotonic()

    def save_now_and_then(state: TrainingState) -> None:
        nonlocal saved_at
        if time.monotonic() - saved_at >= STATE_SECONDS:
            save_state(partial, state, identity)
            saved_at = time.monotonic()

    train_sae(
        stream.training(state.step), stream.d_model, config.sae, device, state=state, after_step=save_now_and_then
    )
    return state


class _ResidualStream:
    """Raw activations of the teacher's block over windows of the token files, [n, d_model] at a time."""

    def __init__(self, model, tokens, config: Config, device):
        self.model, self.config, self.device = model, config, device
        self.d_model = model.config.hidden_size
        self._splits = {name: tokens.split(name) for name in ("train", "val")}

    def training(self, start_step: int) -> Iterator[Tensor]:
        """Endless shuffled batches [batch_tokens, d_model], from the one of step `start_step` on."""
        sae, seq_len, split = self.config.sae, self.config.data.seq_len, self._splits["train"]
        n_windows = math.ceil(BUFFER_BATCHES * sae.batch_tokens / seq_len)
        order = WindowOrder(split.n_windows(seq_len), sae.seed)

        def read_block(index: int) -> Tensor:
            windows = order[np.arange(index * n_windows, (index + 1) * n_windows)]
            return torch.cat(list(self._residuals(split, windows)))

        return shuffled_batches(read_block, n_windows * seq_len, sae.batch_tokens, sae.seed, start_step)

    def validation(self) -> Iterator[Tensor]:
        """Activations of validation windows once each, or of as many, evenly spread, as EVAL_TOKENS allows."""
        split = self._splits["val"]
        return self._residuals(split, self._spread(split, EVAL_TOKENS))

    def validation_windows(self) -> Iterator[Tensor]:
        """Token ids [1, seq_len] of validation windows, as many, evenly spread, as LOSS_TOKENS allows."""
        split = self._splits["val"]
        for index in self._spread(split, LOSS_TOKENS):
            window = split.window(int(index), self.config.data.seq_len)
            yield torch.as_tensor(window)[None].to(self.device)

    def _spread(self, split, max_tokens) -> np.ndarray:
        n_windows = split.n_windows(self.config.data.seq_len)
        n_read = min(n_windows, max(1, max_tokens // self.config.data.seq_len))
        return np.linspace(0, n_windows - 1, n_read, dtype=np.int64)

    def _residuals(self, split, windows) -> Iterator[Tensor]:
        seq_len = self.config.data.seq_len
        at_once = max(1, TEACHER_TOKENS // seq_len)
        for start in range(0, len(windows), at_once):
            rows = [torch.as_tensor(split.window(int(i), seq_len)) for i in windows[start : start + at_once]]
            input_ids = torch.stack(rows).to(self.device)
            yield residual_stream(self.model, self.config.teacher.layer, input_ids).flatten(0, 1)


def _output_folder(config: Config) -> Path:
    """`teacher.sae`, which must be free or hold what an earlier `cocomix sae` wrote: it will be replaced."""
    purpose = {
        "model": "a transformers folder, or hf:NAME on the hub, of the frozen language model",
        "sae": "the folder to write the SAE to",
    }
    for key, meaning in purpose.items():
        if getattr(config.teacher, key) is None:
            raise CocomixError(f"teacher.{key} is not set: give {meaning}")
    folder = Path(cast(str, config.teacher.sae))
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        try:
            read_saved_config(folder)
        except CocomixError as error:
            raise CocomixError(
                f"teacher.sae is {folder}, which exists and was not written by `cocomix sae`: choose "
                f"another path, it would be overwritten ({error})"
            ) from None
    return folder


def _partial_path(folder: Path) -> Path:
    return folder.with_name(folder.name + ".partial.pt")


def _check_teacher(model, tokens, config: Config) -> None:
    check_layer(model, config.teacher.layer)
    check_head(model)
    vocabulary, context = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
    if vocabulary < tokens.vocab_size:
        raise CocomixError(
            f"{config.teacher.model} knows {vocabulary} tokens, but the token files in "
            f"{config.data.folder} use {tokens.vocab_size}: prepare them with the teacher's tokenizer "
            f"(data.tokenizer={config.teacher.model})"
        )
    if context is not None and config.data.seq_len > context:
        raise CocomixError(
            f"data.seq_len is {config.data.seq_len}, but {config.teacher.model} reads at most "
            f"{context} tokens: lower data.seq_len"
        )


def _identity(config: Config, model, tokens) -> dict:
    """Everything that the trained SAE depends on, flat, JSON values."""
    settings = {f"sae.{name}": value for name, value in dataclasses.asdict(config.sae).items()}
    settings |= {"teacher.layer": config.teacher.layer, "teacher.dtype": config.teacher.dtype}
    settings |= {"data.seq_len": config.data.seq_len, "teacher": fingerprint(model)}
    return settings | {f"data.{name}": tokens.split(name).fingerprint for name in ("train", "val")}


def _begun_with(folder: Path) -> dict[str, str]:
    """{"teacher.dtype": that of the training which `folder` or the state beside it is from}, where there is one."""
    training: dict = {}
    if (folder / "config.json").is_file():
        training = read_saved_config(folder).training
    elif _partial_path(folder).is_file():
        training = _identity_of_state(_partial_path(folder))
    return {TEACHER: training[TEACHER]} if TEACHER in training else {}


def _finished_metrics(folder: Path, identity: dict) -> dict | None:
    """Metrics of the SAE that `folder` already holds; None when it holds none."""
    if not (folder / "config.json").is_file():
        return None
    config = read_saved_config(folder)
    require_sound(folder)
    found = differences(config.training, identity)
    if found:
        raise CocomixError(
            f"{folder} already holds an SAE that differs in {', '.join(difference.name for difference in found)}: "
            "choose another teacher.sae, or delete that folder to train it anew"
        )
    return config.metrics


def _summary(metrics: dict) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in metrics.items())
