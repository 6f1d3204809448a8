"""What the tests of the model share: small models, the published numbers, and the model once more, written naively."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cocomix import CoCoMixConfig, CoCoMixForCausalLM, SparseAutoencoder
from cocomix.core.methods import MIXING

DATA = Path(__file__).parents[1] / "fixtures"
GOLDEN_SETTINGS = {"concept_dim": 96, "insert_layer": 1, "concept_topk": 6}  # of tests/fixtures/reference_checkpoint
SMALL = {
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 2,
    "vocab_size": 29,
    "n_positions": 12,
    "concept_dim": 40,
    "concept_topk": 5,
    "insert_layer": 1,
}

METHODS = [  # as settings of a model
    *({"mixing": mixing} for mixing in MIXING),
    *({"mixing": mixing, "concept_residual": True} for mixing in ("interleave", "pause")),
    *({"mixing": mixing, "concept_every": every} for mixing in ("interleave", "pause") for every in (2, 3)),
    {"mixing": "interleave", "concept_residual": True, "concept_every": 4},
]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: "-".join(map(str, method.values())))


def golden(name):
    """A golden file: its arrays by name, and its config."""
    with np.load(DATA / f"{name}_golden.npz") as arrays:
        values = {key: arrays[key] for key in arrays.files}
    return values, json.loads(str(values.pop("config")))


def golden_state(values, prefix="w."):
    """The golden file's tensors under `prefix`, by parameter name."""
    return {key.removeprefix(prefix): torch.from_numpy(v) for key, v in values.items() if key.startswith(prefix)}


def golden_model():
    """The student of the golden file, loaded from its bare state dict, and the file's arrays."""
    values, config = golden("model")
    model = CoCoMixForCausalLM.from_reference(golden_state(values), n_head=config["n_head"], **GOLDEN_SETTINGS)
    return model, {key: torch.from_numpy(value) for key, value in values.items()}


def small_model(dtype=torch.float32, seed=1, **settings):
    """A small model with large random weights everywhere, biases and pre_bias too, so that every part counts."""
    model = CoCoMixForCausalLM(CoCoMixConfig(**{**SMALL, **settings})).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(dtype), alpha=0.2)
    return model.eval()


def method_settings(name):
    """Settings of a model for "interleave", "interleave residual", "pause every-3" and so on."""
    mixing, *more = name.split()
    every = next((int(word.removeprefix("every-")) for word in more if word != "residual"), 1)
    return {"mixing": mixing, "concept_residual": "residual" in more, "concept_every": every}


def autoencoder(width=16, n_latents=64, k=8):
    """A random SAE whose decoder is near its encoder."""
    weight = torch.randn(n_latents, width)
    return SparseAutoencoder(
        weight,
        torch.randn(n_latents) * 0.1,
        torch.randn(width) * 0.1,
        weight + 0.1 * torch.randn_like(weight),
        k,
        normalize=True,
    )


def batch(config, n_rows=2, length=7, n_labels=3, seed=3):
    """Token ids [B, T] and concept labels [B, T, K] with missing ones; the last token of a row has none at all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(config.vocab_size, (n_rows, length), generator=generator)
    labels = torch.rand(n_rows, length, config.concept_dim, generator=generator).argsort(-1)[..., :n_labels]
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = -1
    labels[:, -1] = -1
    return ids, labels


def gradients(model):
    """The parameters' gradients by name."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def naive_student(parameters, config, ids, concept_labels=None):
    """Logits, next-token loss and concept loss of one batch, straight from the method: dense and unfused.

    `parameters` by name. Every position of every block is computed; the concept logits and the code are dense.
    """
    weights = {name.removeprefix("transformer."): value for name, value in parameters.items()}
    x = weights["wte.weight"][ids] + weights["wpe.weight"][: ids.shape[1]]
    concept_loss, read = None, list(range(ids.shape[1]))
    for layer in range(config.n_layer):
        if layer == config.insert_layer and config.mixing != "none":
            concepts = weights.get("pause_tokens.weight")
            if config.mixing != "pause":
                if concept_labels is not None:
                    has_concept = (torch.arange(ids.shape[1]) + 1) % config.concept_every == 0
                    concept_labels = concept_labels.where(has_concept[:, None], -1)
                concepts, concept_loss = _naive_concepts(weights, config, x, concept_labels)
            if config.concept_residual:
                concepts = x + concepts - (0 if config.mixing == "pause" else x.mean(-1, keepdim=True))
            if config.mixing == "add":
                x = x + concepts
            elif config.mixing != "predict":
                x, read = _naive_interleaving(x, concepts.expand_as(x), config.concept_every)
        x = _naive_block(weights, f"h.{layer}.", config, x)
    x = x[:, read]
    logits = _naive_norm(weights, "ln_f", config, x) @ weights["wte.weight"].T
    ntp_loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return logits, ntp_loss, concept_loss


def _naive_interleaving(x, concepts, every):
    """All positions, and those that next tokens are read from: a token's concept where it has one."""
    positions, read = [], []
    for token in range(x.shape[1]):
        positions.append(x[:, token])
        if (token + 1) % every == 0:
            positions.append(concepts[:, token])
        read.append(len(positions) - 1)
    return torch.stack(positions, 1), read


def _naive_concepts(weights, config, h, concept_labels):
    mean = h.mean(-1, keepdim=True)
    std = ((h - mean).square().sum(-1, keepdim=True) / (h.shape[-1] - 1)).sqrt()
    normalised = (h - mean) / (std + 1e-5) - weights["pre_bias"]
    z = normalised @ weights["concept_predictor.weight"].T + weights["concept_predictor.bias"]
    kept = z.topk(config.concept_topk, dim=-1).indices
    concepts = None
    if config.mixing != "predict":
        code = torch.zeros_like(z).scatter(-1, kept, z.gather(-1, kept))
        compressed = code @ weights["compress_layer.weight"] + weights["compress_layer.bias"] + weights["pre_bias"]
        concepts = compressed * std + mean
    if concept_labels is None:
        return concepts, None
    per_token = []
    for logits, labels in zip(z.flatten(0, 1), concept_labels.flatten(0, 1).tolist(), strict=True):
        present = [label for label in labels if label >= 0]
        if present:
            per_token.append(sum(F.cross_entropy(logits, torch.tensor(label)) for label in present) / len(present))
    return concepts, torch.stack(per_token).mean() if per_token else z.sum() * 0


def _naive_norm(weights, name, config, x):
    variance, mean = torch.var_mean(x, -1, keepdim=True, correction=0)
    x = (x - mean) / (variance + config.layer_norm_epsilon).sqrt()
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _naive_block(weights, name, config, x):
    def linear(part, y):
        return y @ weights[f"{name}{part}.weight"] + weights[f"{name}{part}.bias"]

    normed = _naive_norm(weights, f"{name}ln_1", config, x)
    q, k, v = (t.unflatten(-1, (config.n_head, -1)) for t in linear("attn.c_attn", normed).chunk(3, -1))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    attention = scores.masked_fill(future, -math.inf).softmax(-1)
    x = x + linear("attn.c_proj", torch.einsum("bhqk,bkhd->bqhd", attention, v).flatten(2))
    y = linear("mlp.c_fc", _naive_norm(weights, f"{name}ln_2", config, x))
    gelu = 0.5 * y * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return x + linear("mlp.c_proj", gelu)


def greedy(model, ids, n_new, **options):
    """Token ids of the prompts and of `n_new` greedy tokens."""
    options = {"attention_mask": torch.ones_like(ids), **options}  # else generate() takes tokens for padding
    return model.generate(ids, max_new_tokens=n_new, do_sample=False, pad_token_id=0, **options)


def left_padded(prompts, length):
    """Prompts padded on the left with a token other than zero, and their attention mask."""
    ids = torch.full((len(prompts), length), 7)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    return ids, mask


@torch.no_grad()
def naive_loss_of_windows(model, split, seq_len, windows):
    """Next-token loss, mean over every prediction of windows of a token file's split, from logits."""
    ids = torch.from_numpy(np.stack([split.window(i, seq_len) for i in windows]))
    logits = model(ids).logits[:, :-1]
    return float(F.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()))
