"""The concepts of a text: as the model keeps them, with the teacher's labels."""

import copy

import numpy as np
import pytest
import torch
from run_helpers import SEQ_LEN
from usable_helpers import world_of_runs

from cocomix import CoCoMixForCausalLM
from cocomix.core.errors import CocomixError
from cocomix.inference.concept_cards import chosen_concepts, make_card
from cocomix.inference.concept_page import page
from cocomix.inference.concept_reading import agreement, compress_norms, first_tokens, ignored, read_text
from cocomix.inference.concept_survey import Corpus, survey
from cocomix.inference.concepts import summary_lines
from cocomix.inference.loading import load_teacher, load_usable

TEXT = "the quick brown cat jumps over a lazy dog and sleeps under the tree, or eats."
K = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return world_of_runs(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def usable(world):
    return load_usable(world.folder / "run")


@pytest.fixture(scope="module")
def reading(world, usable):
    return read_text(usable, TEXT, 1000, load_teacher(world.folder / "run", None, usable))


def windows_of(text, usable):
    ids = usable.tokenizer(text)["input_ids"]
    return [torch.tensor(ids[i : i + SEQ_LEN]) for i in range(0, len(ids), SEQ_LEN)]


def test_the_concepts_of_a_text_are_what_the_model_keeps_and_the_labels_what_the_teacher_gives(world, usable, reading):
    teacher = load_teacher(world.folder / "run", world.config, usable)
    windows = windows_of(TEXT, usable)
    assert len(windows) >= 2 and reading.window == SEQ_LEN and reading.n_left_out == 0
    outs = [usable.model(window[None]) for window in windows]
    concepts = torch.cat([out.concept_indices[0] for out in outs]).numpy()
    weights = torch.cat([out.concept_values[0] for out in outs]).detach().numpy()
    assert np.array_equal(reading.concepts, concepts) and np.allclose(reading.weights, weights, atol=1e-5)
    assert np.array_equal(reading.labels, torch.cat([teacher.labels(window[None])[0] for window in windows]).numpy())
    assert "".join(reading.tokens) == TEXT and reading.concepts.shape == (len(reading.ids), K)
    rows = usable.model.transformer.compress_layer.weight.detach().numpy()
    for i in (0, 5, len(reading.ids) - 1):
        strength = np.abs(weights[i]) * np.linalg.norm(rows[concepts[i]], axis=1)
        assert np.allclose(reading.shares[i], strength / strength.sum(), atol=1e-5)
        assert reading.main[i] == concepts[i][strength.argmax()]


def test_a_long_text_is_cut_where_it_is_said_and_counted(usable):
    whole, cut = (read_text(usable, TEXT, n) for n in (1000, 7))
    assert len(cut.ids) == 7 and cut.n_left_out == len("".join(whole.tokens[7:])) and cut.labels is None
    assert np.array_equal(cut.concepts, whole.concepts[:7])
    with pytest.raises(CocomixError, match="no text to read"):
        read_text(usable, "", 10)


@pytest.mark.parametrize(
    "text", [TEXT * 300, "äöü € " * 3000, "x" * 20_000, " \n" * 9000, "word" * 900 + " end " * 9000]
)
@pytest.mark.parametrize("n", [1, 100, 1000])
def test_the_first_tokens_are_those_of_the_whole_text(usable, text, n):
    whole = usable.tokenizer(text, return_offsets_mapping=True)
    ids, n_characters = first_tokens(usable.tokenizer, text, n)
    assert ids == whole["input_ids"][:n]
    assert n_characters == whole["offset_mapping"][len(ids) - 1][1]


def test_of_a_long_text_only_the_beginning_is_tokenized(usable):
    seen = []

    def counting(text, **options):
        seen.append(len(text))
        return usable.tokenizer(text, **options)

    first_tokens(counting, TEXT * 100_000, 64)
    assert sum(seen) < 100_000


def test_agreement_counts_the_labels_that_were_predicted(reading):
    given = found = 0
    for kept, labels in zip(reading.concepts.tolist(), reading.labels.tolist(), strict=True):
        for label in labels:
            given += label >= 0
            found += label >= 0 and label in kept
    assert given > 0
    assert f"{found:,} of the teacher's {given:,} labels" in agreement(reading)


def test_norms_are_those_of_the_rows_and_small_ones_count_as_ignored(usable):
    norms = compress_norms(usable.model)
    assert norms[11].item() == pytest.approx(usable.model.transformer.compress_layer.weight[11].norm().item())
    assert ignored(np.array([1.0, 1.0, 2.0, 0.05, 0.15])).tolist() == [False, False, False, True, False]


@pytest.mark.parametrize("every", [2, 3, SEQ_LEN + 1])
def test_tokens_without_a_concept_position_have_neither_concepts_nor_labels(world, usable, every):
    config = copy.deepcopy(usable.model.config)
    config.concept_every = every
    spaced = usable._replace(model=CoCoMixForCausalLM(config).eval())
    teacher = load_teacher(world.folder / "run", world.config, usable)
    found = read_text(spaced, TEXT, 1000, teacher)
    at = 0
    for window in windows_of(TEXT, usable):
        out, labels = spaced.model(window[None]), teacher.labels(window[None])[0]
        for i in range(len(window)):
            if (i + 1) % every:
                assert not found.has_concept[at] and found.main[at] == -1
                assert (found.concepts[at] == -1).all() and (found.labels[at] == -1).all()
                assert (found.weights[at] == 0).all() and (found.shares[at] == 0).all()
            else:
                assert found.concepts[at].tolist() == out.concept_indices[0, i // every].tolist()
                assert np.allclose(found.weights[at], out.concept_values[0, i // every].detach(), atol=1e-5)
                assert found.labels[at].tolist() == labels[i].tolist()
                assert found.shares[at].sum() == pytest.approx(1)
            at += 1
    assert at == len(found.ids)
    assert (agreement(found) == "") == (every > SEQ_LEN)
    assert -1 not in chosen_concepts(found, [])


@pytest.mark.parametrize("every", [3, SEQ_LEN])
def test_a_text_is_shown_with_concepts_where_there_are_some(usable, every, tmp_path):
    config = copy.deepcopy(usable.model.config)
    config.concept_every = every
    spaced = usable._replace(model=CoCoMixForCausalLM(config).eval())
    found = read_text(spaced, TEXT, 1000)
    chosen = chosen_concepts(found, [5])
    text = tmp_path / "corpus.txt"
    text.write_text(TEXT * 4)
    surveyed = survey(spaced.model, Corpus(str(text), usable.tokenizer, SEQ_LEN, 200), chosen)
    cards = [make_card(spaced, concept, found, surveyed) for concept in chosen]
    n = int(found.has_concept.sum())
    lines = "\n".join(summary_lines(found, cards, surveyed, {}, per_token=True))
    assert f"{len(found.ids):,} tokens of text, {n:,} of them with concepts, " in lines and " -1 " not in lines
    norms = compress_norms(spaced.model).numpy()
    html = page("it", usable.tokenizer, found, cards, surveyed, {}, norms)
    assert f"{n:,} of which have concepts of their own" in html and ">-1<" not in html
