"""Teachers of several families and sizes: their labels against a naive computation, and students that learn from them.

Random weights, made from each family's config; loaded from disk the way `teacher.model` is.
"""

import pytest
import torch
import torch.nn.functional as F
from model_helpers import autoencoder
from run_helpers import LATENTS, SEQ_LEN, World
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from cocomix import ConceptTeacher
from cocomix.model.pretrained import load_language_model
from cocomix.teacher.extraction import run as make_labels
from cocomix.teacher.language_model import transformer_blocks
from cocomix.teacher.sae import SparseAutoencoder

N_LAYERS, WIDTH, VOCABULARY, LENGTH, LABEL_TOPK = 3, 16, 43, 10, 4
_SHARED = dict(
    vocab_size=VOCABULARY,
    hidden_size=WIDTH,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=2,
    max_position_embeddings=32,
)
_LLAMA_LIKE = dict(**_SHARED, intermediate_size=24, num_key_value_heads=1)
FAMILIES = {
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=WIDTH, n_layer=N_LAYERS, n_head=2, n_positions=32),
    "llama": LlamaConfig(**_LLAMA_LIKE),
    "pythia": GPTNeoXConfig(**_SHARED, intermediate_size=24, use_parallel_residual=True),
    "gpt_neox": GPTNeoXConfig(**_SHARED, intermediate_size=24, use_parallel_residual=False),
    "qwen2": Qwen2Config(**_LLAMA_LIKE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_LLAMA_LIKE, head_dim=8),
    "mistral": MistralConfig(**_LLAMA_LIKE, sliding_window=6),
    "gpt_neo": GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_layers=N_LAYERS,
        num_heads=2,
        attention_types=[[["global", "local", "global"], 1]],
        max_position_embeddings=32,
    ),
    "opt": OPTConfig(**_SHARED, ffn_dim=24, word_embed_proj_dim=WIDTH),
}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A random model of a family on disk, with weights large enough for every part to count."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[request.param])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


def naive_attributions(folder, sae, layer, window):
    """Dense attributions [T, C] of one window [1, T]: logits, cross-entropy, and autograd to the block's output."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen = []

    def keep(_module, _args, output):
        seen.append(output[0] if isinstance(output, tuple) else output)

    transformer_blocks(model)[layer].register_forward_hook(keep)
    logits = model(window).logits[0]
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits[:-1], window[0, 1:]), seen[0])
    x = seen[0][0]
    centred = x - x.mean(-1, keepdim=True)
    pre = (centred / (centred.std(-1, keepdim=True) + 1e-5) - sae.pre_bias) @ sae.W_enc.T + sae.latent_bias
    latents = torch.where(pre >= pre.topk(sae.k).values[:, -1:], pre, 0).relu()
    return (latents * (gradient[0] @ sae.decoder.T)).detach()


@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_labels_are_the_largest_positive_attributions_of_a_naive_computation(folder, layer):
    sae = autoencoder(WIDTH)
    windows = torch.randint(VOCABULARY, (3, LENGTH))
    labels = ConceptTeacher(load_language_model(folder), sae, layer, LABEL_TOPK).labels(windows)
    for window, found in zip(windows, labels, strict=True):
        attributions = naive_attributions(folder, sae, layer, window[None])
        best = attributions.topk(LABEL_TOPK).values.clamp(min=0)
        picked = attributions.gather(1, found.clamp(min=0)) * (found >= 0)  # in float32 near ties may change places
        torch.testing.assert_close(picked, best, rtol=1e-3, atol=1e-5 * float(attributions.abs().max()))
        assert (found[:-1, 0] >= 0).sum() >= LENGTH // 2 and (found[-1] == -1).all()
        assert all(len(set(row)) == len(row) for row in ([i for i in row if i >= 0] for row in found.tolist()))


# --- weak to strong


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Students of width 32 and three blocks, and smaller teachers: of width 8 and 24, with one and four blocks."""
    world = World(tmp_path_factory.mktemp("world"))
    torch.manual_seed(1)
    shapes = {
        "gpt2": (24, GPT2Config(vocab_size=300, n_embd=24, n_layer=4, n_head=2, n_positions=SEQ_LEN)),
        "pythia": (
            8,
            GPTNeoXConfig(
                vocab_size=300,
                hidden_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=SEQ_LEN,
            ),
        ),
    }
    for name, (width, config) in shapes.items():
        config.initializer_range = 0.2
        AutoModelForCausalLM.from_config(config).save_pretrained(world.folder / f"teacher-{name}")
        decoder = F.normalize(torch.randn(LATENTS, width), dim=1)
        SparseAutoencoder(decoder.clone(), torch.zeros(LATENTS), torch.zeros(width), decoder, 4, normalize=True).save(
            world.folder / f"sae-{name}"
        )
    return world


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layer"), [("gpt2", 3), ("pythia", 0)])
def test_a_larger_student_learns_the_concepts_of_a_smaller_teacher(world, name, layer):
    teacher = [
        f"teacher.model={world.folder}/teacher-{name}",
        f"teacher.sae={world.folder}/sae-{name}",
        f"teacher.layer={layer}",
    ]
    cache = f"concept_labels.cache={world.folder}/labels-{name}"
    longer = ["train.tokens=7680", "train.lr=1e-2"]  # 60 steps
    assert world.train(f"online-{name}", *teacher, *longer) == 0
    make_labels(world.load(*teacher, cache))
    assert (
        world.train(
            f"cached-{name}", cache, "teacher.model=null", "teacher.sae=null", f"teacher.layer={layer}", *longer
        )
        == 0
    )
    concept_losses = world.losses(f"online-{name}", "concept_loss")
    assert concept_losses == world.losses(f"cached-{name}", "concept_loss")
    assert sum(concept_losses[-5:]) < 0.9 * sum(concept_losses[:5])
