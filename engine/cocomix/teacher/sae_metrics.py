"""How good a sparse autoencoder is: what it explains, how sparse it is, and what the language model loses by it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cocomix.teacher.language_model import head_weight, transformer_blocks
from cocomix.teacher.sae import SparseAutoencoder
from cocomix_kernels import linear_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def evaluate(sae: SparseAutoencoder, activations: Iterable[Tensor], silent: Tensor | None = None) -> dict:
    """Metrics of an SAE on raw activations, batches [n, d].

    explained_variance: 1 - squared error / total variance of the normalised inputs about their mean. l0: active
    latents a token. dead_share: latents that never fired here and, with `silent` [C] bool, are marked there too.
    tokens: rows that were read.
    """
    device = sae.W_enc.device
    error, squares = torch.zeros(2, dtype=torch.float64, device=device)
    total = torch.zeros(sae.d_model, dtype=torch.float64, device=device)
    fired = torch.zeros(sae.n_latents, dtype=torch.float64, device=device)
    n = 0
    for batch in activations:
        x_hat = sae.normalize(batch.to(device))[0]
        values, indices = sae.encode_normalized(x_hat)
        error += (sae.decode(values, indices) - x_hat).square().sum()
        squares += x_hat.square().sum()
        total += x_hat.sum(0)
        fired += firing_counts(values, indices, sae.n_latents)
        n += len(batch)
    variance = squares - total.square().sum() / n
    dead = fired == 0 if silent is None else (fired == 0) & silent
    return {
        "explained_variance": 1 - (error / variance).item(),
        "l0": fired.sum().item() / n,
        "dead_share": dead.double().mean().item(),
        "tokens": n,
    }


def firing_counts(values: Tensor, indices: Tensor, n_latents: int) -> Tensor:
    """How often each latent is active among values, indices [n, k] -> [C], fp32."""
    counts = torch.zeros(n_latents, device=values.device)
    return counts.index_add_(0, indices.flatten(), (values > 0).flatten().float())


@torch.no_grad()
def losses_under_reconstruction(
    model: "PreTrainedModel", layer: int, sae: SparseAutoencoder, windows: Iterable[Tensor]
) -> dict[str, float]:
    """What the language model loses when the SAE's reconstruction stands for the output of its block `layer`.

    `windows` yields token ids [B, T]. Mean next-token losses in nats: loss_clean, loss_reconstructed, and loss_zeroed
    where the block's output is zero. loss_recovered is (zeroed - reconstructed) / (zeroed - clean): 1 where the
    reconstruction is as good as the original, 0 where it is as good as nothing (as in "Improving dictionary learning
    with gated sparse autoencoders", arXiv 2404.16014); it is left out where zeroing changes nothing. The head must be
    one product (`teacher.check_head`).
    """
    ways = {"loss_clean": None, "loss_reconstructed": sae, "loss_zeroed": torch.zeros_like}
    sums, count = dict.fromkeys(ways, 0.0), 0
    for ids in windows:
        count += ids[:, 1:].numel()
        for name, replacement in ways.items():
            with _output_replaced(transformer_blocks(model)[layer], replacement):
                hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
            loss = linear_cross_entropy(hidden[:, :-1].flatten(0, 1), head_weight(model), ids[:, 1:].flatten())
            sums[name] += loss.item() * ids[:, 1:].numel()
    losses = {name: total / count for name, total in sums.items()}
    clean, reconstructed, zeroed = losses.values()
    if zeroed != clean:
        losses["loss_recovered"] = (zeroed - reconstructed) / (zeroed - clean)
    return losses


@contextlib.contextmanager
def _output_replaced(block: nn.Module, replacement: Callable[[Tensor], Tensor] | None) -> Iterator[None]:
    """Within the block, `replacement` of the module's output stands for it; None: nothing is replaced."""

    def hook(_module, _args, output):
        if replacement is None:
            return output
        original = output[0] if isinstance(output, tuple) else output
        new = replacement(original).to(original.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = block.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
