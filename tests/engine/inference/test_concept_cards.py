"""Cards of concepts: what one does, measured and approximate."""

import numpy as np
import pytest
import torch
from run_helpers import LATENTS, SEQ_LEN
from usable_helpers import world_of_runs

from cocomix.inference.concept_cards import chosen_concepts, direct_tokens, make_card, measured_tokens
from cocomix.inference.concept_reading import read_text
from cocomix.inference.concept_survey import Corpus, survey
from cocomix.inference.loading import load_teacher, load_usable
from cocomix.inference.steering import steer

TEXT = "the quick brown cat jumps over a lazy dog and sleeps under the tree, or eats."


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return world_of_runs(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def usable(world):
    return load_usable(world.folder / "run")


@pytest.fixture(scope="module")
def reading(world, usable):
    return read_text(usable, TEXT, 1000, load_teacher(world.folder / "run", None, usable))


def test_concepts_that_were_asked_for_come_first_and_then_the_main_ones(reading):
    counts = np.bincount(reading.main, minlength=LATENTS)
    chosen = chosen_concepts(reading, [63, 2], n=3)
    assert chosen[:2] == [63, 2] and 3 <= len(chosen) <= 5
    others = [concept for concept in chosen[2:]]
    assert [counts[concept] for concept in others] == sorted((counts[c] for c in others), reverse=True)
    assert counts[others[0]] == counts.max() or counts[[63, 2]].max() == counts.max()


def test_direct_tokens_are_the_row_through_the_final_norm_and_the_head(usable):
    model = usable.model
    row = model.transformer.compress_layer.weight[9].detach().numpy()
    unit = (row - row.mean()) / row.std() * model.transformer.ln_f.weight.detach().numpy()
    logits = model.lm_head.weight.detach().numpy() @ unit
    found = direct_tokens(usable, 9, n=5)
    assert [logit for _, logit in found] == pytest.approx(np.sort(logits)[::-1][:5].tolist(), rel=1e-4)
    assert [token for token, _ in found] == [usable.tokenizer.decode([i]) for i in np.argsort(-logits)[:5]]


def test_measured_tokens_are_what_the_model_loses_without_the_concept(world, usable):
    corpus = Corpus(world.folder / "data", usable.tokenizer, SEQ_LEN, max_tokens=8 * SEQ_LEN)
    found = survey(usable.model, corpus, range(LATENTS), n_contexts=3)
    concept = int(found.fired.argmax())
    contexts = found.followed[concept].contexts
    with_it = without = 0
    for context in contexts:
        ids = torch.from_numpy(context.ids)[None]
        with_it = with_it + usable.model(ids).logits[0, -1].softmax(-1) / len(contexts)
        with steer(usable.model, {concept: "set:0"}):
            without = without + usable.model(ids).logits[0, -1].softmax(-1) / len(contexts)
    best = int((with_it - without).argmax())
    token, before, after = measured_tokens(usable, concept, contexts)[0]
    assert token == usable.tokenizer.decode([best]) and before > after
    assert (before, after) == pytest.approx((with_it[best].item(), without[best].item()), abs=1e-5)
    assert measured_tokens(usable, concept, []) == []


def test_a_card_counts_the_text_and_the_teachers_labels(world, usable, reading):
    concept = int(next(label for label in reading.labels.ravel() if label >= 0))
    found = survey(usable.model, Corpus(world.folder / "data", usable.tokenizer, SEQ_LEN, 64), [concept])
    card = make_card(usable, concept, reading, found)
    kept = [concept in row for row in reading.concepts.tolist()]
    labelled = [concept in row for row in reading.labels.tolist()]
    assert (card.in_text, card.labelled) == (sum(kept), sum(labelled)) and card.labelled > 0
    assert card.agreed == sum(a and b for a, b in zip(kept, labelled, strict=True))
