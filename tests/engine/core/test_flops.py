"""The arithmetic of flops.py against the paper's ratios, the real model's weights and PyTorch's counter."""

import pytest
import torch
from flop_helpers import count_flops
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import CoCoMixConfig, CoCoMixForCausalLM, ConceptTeacher, SparseAutoencoder
from cocomix.core.flops import (
    cocomix_forward,
    forward_parts,
    labels_online,
    ntp_forward,
    parameter_count,
    parameter_sizes,
    training_flops,
)
from cocomix.core.methods import MIXING, predicts_concepts
from cocomix.core.shapes import StudentShape, TeacherShape

GPT2 = TeacherShape(n_embd=768, n_layer=12, layer=5, vocab_size=50257, n_latents=32768)
SHAPE = {"n_embd": 64, "n_layer": 4, "insert_layer": 1, "vocab_size": 512, "concept_dim": 256, "concept_topk": 4}


def paper(n_embd, n_layer, insert_layer):
    return StudentShape(
        n_embd, n_layer, insert_layer, vocab_size=50257, seq_len=1024, concept_dim=32768, concept_topk=32
    )


@pytest.mark.parametrize(
    "shape, cached, online",
    [
        (paper(512, 8, 3), 1.67, 3.17),
        (paper(1024, 24, 5), 1.84, 2.06),
        (paper(2048, 24, 5), 1.81, 1.87),
    ],
)
def test_arithmetic_over_next_token_predictions_at_the_papers_sizes(shape, cached, online):
    ntp = 6 * ntp_forward(shape)
    assert training_flops(shape) / ntp == pytest.approx(cached, abs=0.005)
    assert training_flops(shape, GPT2) / ntp == pytest.approx(online, abs=0.005)


@pytest.mark.parametrize(
    "shape, ratios",
    [
        (paper(512, 8, 3), (1.32, 1.16, 1.08)),
        (paper(1024, 24, 5), (1.41, 1.20, 1.10)),
        (paper(2048, 24, 5), (1.40, 1.20, 1.10)),
    ],
)
def test_fewer_concept_positions_cost_less(shape, ratios):
    found = [
        training_flops(StudentShape(**{**shape.__dict__, "concept_every": every})) / (6 * ntp_forward(shape))
        for every in (2, 4, 8)
    ]
    assert found == pytest.approx(ratios, abs=0.02)


def test_parts_add_up_and_a_plain_model_has_no_concepts():
    shape = paper(512, 8, 3)
    assert sum(forward_parts(shape).values()) == cocomix_forward(shape)
    assert training_flops(shape) == 6 * cocomix_forward(shape)
    plain = StudentShape(**{**shape.__dict__, "mixing": "none"})
    assert set(forward_parts(plain)) == {"blocks", "attention", "LM head"}
    assert training_flops(plain, GPT2) == 6 * ntp_forward(shape)  # who needs no labels pays for none


def build(mixing, seq_len, **more):
    shape = StudentShape(**{**SHAPE, **more}, seq_len=seq_len, mixing=mixing)
    settings = {**shape.__dict__, "n_positions": seq_len}
    del settings["seq_len"]
    return shape, CoCoMixForCausalLM(CoCoMixConfig(**settings, n_head=4)).train()


@pytest.mark.parametrize("mixing", MIXING)
def test_parameters_are_those_of_the_real_model_one_by_one(mixing):
    shape, model = build(mixing, seq_len=24)
    assert sorted(parameter_sizes(shape)) == sorted(p.numel() for p in model.parameters())
    assert parameter_count(shape) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("insert_layer", [0, 1, 3])
@pytest.mark.parametrize(
    "mixing, every", [*((mixing, 1) for mixing in MIXING), ("interleave", 2), ("interleave", 4), ("pause", 3)]
)
def test_training_flops_are_those_that_pytorchs_counter_counts(mixing, every, insert_layer):
    """Forward and backward pass of the model. Counted are all products with weights, both products of attention over
    the causal half, and the heads' products; the compress layer's gather is not a product for the counter."""
    length, rows = 256, 2
    shape, model = build(mixing, length, insert_layer=insert_layer, concept_every=every)
    ids = torch.randint(shape.vocab_size, (rows, length))
    labels = torch.randint(shape.concept_dim, (rows, length, 3))
    counted, seen = count_flops(lambda: model(ids, labels=ids, concept_labels=labels).loss.backward())
    own = {"cocomix.concept_head", "cocomix.concept_head_backward"}
    assert own & seen == (own if predicts_concepts(mixing) else set())
    assert rows * length * training_flops(shape) == pytest.approx(counted, rel=0.02)


def test_label_flops_are_those_that_pytorchs_counter_counts():
    """The teacher's forward pass, its backward pass down to the SAE's block, and the SAE's encoder."""
    length, rows, width, latents = 256, 2, 64, 512
    teacher = TeacherShape(n_embd=width, n_layer=4, layer=1, vocab_size=512, n_latents=latents)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=512, n_positions=length, n_embd=width, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=None
        )
    )
    sae = SparseAutoencoder(
        torch.randn(latents, width),
        torch.zeros(latents),
        torch.zeros(width),
        torch.randn(latents, width),
        4,
        normalize=True,
    )
    labelling = ConceptTeacher(model, sae, teacher.layer, 3)
    counted, seen = count_flops(lambda: labelling.labels(torch.randint(512, (rows, length))))
    assert "cocomix.topk_linear" in seen
    assert rows * length * 2 * labels_online(teacher, length) == pytest.approx(counted, rel=0.02)
