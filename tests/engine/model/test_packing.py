"""Several documents in a row, told by positions that start again, as transformers packs them."""

import pytest
import torch
from model_helpers import batch, every_method, gradients, small_model
from torch.testing import assert_close
from transformers import GPT2Config, GPT2LMHeadModel

from cocomix import CoCoMixForCausalLM

LENGTHS = [(12, 12), (24, 12, 12)]  # of documents; 2, 3 and 4 tokens share a concept position


def exact(actual, expected):
    assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def positions(lengths) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def wide_model(method):
    return small_model(torch.float64, n_positions=48, **method)


@every_method
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_documents_are_what_they_are_alone(method, lengths, use_cache):
    model = wide_model(method).eval()
    ids, _ = batch(model.config, n_rows=2, length=sum(lengths))
    packed = model(ids, position_ids=positions(lengths), use_cache=use_cache).logits
    exact(packed, torch.cat([model(document).logits for document in ids.split(lengths, dim=1)], 1))


@every_method
def test_losses_and_every_gradient_are_those_of_the_documents_alone(method):
    lengths = (12, 24, 12)
    model = wide_model(method)
    ids, concepts = batch(model.config, n_rows=2, length=sum(lengths))
    labels = ids.clone()
    labels[:, [0, 12, 36]] = -100  # no document's first token is predicted from the one before

    def total(out, n_predicted, n_labelled):
        concept_loss = 0.0 if out.concept_loss is None else out.concept_loss * n_labelled
        return out.ntp_loss * n_predicted + concept_loss

    def labelled(concept_labels):
        return (concept_labels[:, model.config.concept_tokens] >= 0).any(-1).sum()

    model.zero_grad()
    out = model(ids, position_ids=positions(lengths), labels=labels, concept_labels=concepts)
    packed = total(out, 2 * 45, labelled(concepts))
    packed.backward()
    of_packed = gradients(model)
    model.zero_grad()
    parts = zip(ids.split(lengths, 1), concepts.split(lengths, 1), strict=True)
    alone = sum(
        total(model(part, labels=part, concept_labels=known), 2 * (part.shape[1] - 1), labelled(known))
        for part, known in parts
    )
    alone.backward()
    exact(packed, alone)
    of_alone = gradients(model)
    assert set(of_packed) == set(of_alone)
    for name, gradient in of_packed.items():
        assert_close(gradient, of_alone[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@every_method
def test_rows_may_be_packed_differently_and_filled_up(method):
    model = wide_model(method).eval()
    ids, _ = batch(model.config, n_rows=2, length=48)
    position_ids = torch.cat([positions((12, 24, 12)), positions((24, 24))])
    attention_mask = torch.ones_like(ids)
    attention_mask[:, 40:] = 0
    position_ids[:, 40:] = 0  # of padding
    packed = model(ids, position_ids=position_ids, attention_mask=attention_mask).logits
    for row, lengths in ((0, (12, 24, 4)), (1, (24, 16))):
        documents = ids[row : row + 1, :40].split(lengths, 1)
        exact(packed[row : row + 1, :40], torch.cat([model(document).logits for document in documents], 1))


def test_documents_of_one_token_see_themselves_alone():
    model = wide_model({"mixing": "interleave"}).eval()
    ids, _ = batch(model.config, n_rows=1, length=3)
    packed = model(ids, position_ids=torch.zeros(1, 3, dtype=torch.long)).logits
    exact(packed, torch.cat([model(ids[:, i : i + 1]).logits for i in range(3)], 1))


def test_plain_students_pack_as_transformers_gpt2_does():
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=60, n_positions=48)).double().eval()
    model = CoCoMixForCausalLM.from_gpt2(gpt2).double().eval()
    ids = torch.randint(60, (1, 48))
    position_ids = positions((12, 24, 12))
    exact(
        model(ids, position_ids=position_ids, use_cache=False).logits,
        gpt2(ids, position_ids=position_ids, use_cache=False).logits,
    )


def test_positions_that_skip_begin_no_document():
    model = wide_model({"mixing": "interleave"}).eval()
    ids, _ = batch(model.config, n_rows=1, length=6)
    skipping = model(ids, position_ids=torch.tensor([[0, 1, 2, 7, 8, 9]])).logits
    other = ids.clone()
    other[0, 0] = (other[0, 0] + 1) % model.config.vocab_size
    assert not torch.equal(skipping[:, -1], model(other, position_ids=torch.tensor([[0, 1, 2, 7, 8, 9]])).logits[:, -1])


@pytest.mark.parametrize("mixing", ["interleave", "pause"])
def test_a_document_that_begins_inside_a_group_is_refused(mixing):
    model = wide_model({"mixing": mixing, "concept_every": 3}).eval()
    ids, _ = batch(model.config, n_rows=1, length=12)
    with pytest.raises(ValueError, match=r"must begin at multiples of concept_every=3 tokens.*begin at \[4\]"):
        model(ids, position_ids=positions((4, 8)))
