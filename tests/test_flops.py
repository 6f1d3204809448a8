"""The arithmetic of flops.py against the paper's ratios, the real model's weights and PyTorch's counter."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cocomix import CoCoMixConfig, CoCoMixForCausalLM
from cocomix.flops import (
    StudentShape,
    TeacherShape,
    cocomix_forward,
    forward_parts,
    ideal_ratio,
    ntp_forward,
    parameter_count,
    parameter_sizes,
    training_flops,
)

GPT2 = TeacherShape(n_embd=768, n_layer=12, layer=5, vocab_size=50257, n_latents=32768)
SHAPE = {"n_embd": 64, "n_layer": 4, "insert_layer": 1, "vocab_size": 512, "concept_dim": 256, "concept_topk": 4}
aten = torch.ops.aten


def paper(n_embd, n_layer, insert_layer):
    return StudentShape(n_embd, n_layer, insert_layer, vocab_size=50257, seq_len=1024, concept_dim=32768,
                        concept_topk=32)


@pytest.mark.parametrize("shape, cached, online", [
    (paper(512, 8, 3), 1.67, 3.17),
    (paper(1024, 24, 5), 1.84, 2.06),
    (paper(2048, 24, 5), 1.81, 1.87),
])
def test_ideal_ratios_of_the_papers_sizes(shape, cached, online):
    assert ideal_ratio(shape) == pytest.approx(cached, abs=0.005)
    assert ideal_ratio(shape, GPT2) == pytest.approx(online, abs=0.005)


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


@pytest.mark.parametrize("mixing", ["interleave", "add", "none"])
def test_parameters_are_those_of_the_real_model_one_by_one(mixing):
    shape, model = build(mixing, seq_len=24)
    assert sorted(parameter_sizes(shape)) == sorted(p.numel() for p in model.parameters())
    assert parameter_count(shape) == sum(p.numel() for p in model.parameters())


def attention_flops(q, k, _v, *_, **__):
    """Two products; a causal call computes half of the square of scores."""
    batch, heads, queries, head = q
    return 2 * 2 * batch * heads * queries * k[2] * head // 2


def attention_backward_flops(_grad, q, k, *rest, **__):
    return 2 * attention_flops(q, k, None)


def concept_head_flops(x, weight, _bias, labels, _k, dx_wanted, dw_wanted, *_, **__):
    """Logits and, with labels, at once the loss's dx and dW."""
    return 2 * math.prod(x) * weight[0] * (1 + (labels is not None) * (dx_wanted + dw_wanted))


def concept_head_backward_flops(grad_values, _grad_loss, indices, x, *_, **__):
    """The gradient through the kept values touches k rows a token, for dx and for dW."""
    return 2 * 2 * math.prod(indices) * x[1]


def plain_loss(x, weight, labels):
    """The head's loss by a product that the counter sees; which library fuses it depends on PyTorch's version."""
    return F.cross_entropy(x @ weight.t(), labels)


# What PyTorch's counter does not know, or counts as if attention were not causal. It does not look inside these.
FORMULAS = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    torch.ops.cocomix.concept_head: concept_head_flops,
    torch.ops.cocomix.concept_head_backward: concept_head_backward_flops,
}


@pytest.mark.parametrize("insert_layer", [0, 1, 3])
@pytest.mark.parametrize("mixing", ["interleave", "add", "none"])
def test_training_flops_are_those_that_pytorchs_counter_counts(mixing, insert_layer, monkeypatch):
    """Forward and backward pass of the model. Counted are all products with weights, both products of attention over
    the causal half, and the heads' products; the compress layer's gather is no product for the counter."""
    length, rows = 256, 2
    shape, model = build(mixing, length, insert_layer=insert_layer)
    ids = torch.randint(shape.vocab_size, (rows, length))
    labels = torch.randint(shape.concept_dim, (rows, length, 3))
    monkeypatch.setattr("cocomix.model.linear_cross_entropy", plain_loss)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        model(ids, labels=ids, concept_labels=labels).loss.backward()
    seen = {str(op) for ops in counter.get_flop_counts().values() for op in ops}
    own = {"cocomix.concept_head", "cocomix.concept_head_backward"}
    assert own & seen == (set() if mixing == "none" else own)
    assert rows * length * training_flops(shape) == pytest.approx(counter.get_total_flops(), rel=0.02)
