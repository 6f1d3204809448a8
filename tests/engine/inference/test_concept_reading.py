"""The concepts of a text: as the model keeps them, with the teacher's labels."""

import copy

import numpy as np
import pytest
import torch
from run_helpers import SEQ_LEN
from usable_helpers import world_of_runs

from cocomix import CoCoMixForCausalLM
from cocomix.core.errors import CocomixError
from cocomix.inference.concept_reading import agreement, compress_norms, ignored, read_text
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
    assert len(cut.ids) == 7 and cut.n_left_out == len(whole.ids) - 7 and cut.labels is None
    assert np.array_equal(cut.concepts, whole.concepts[:7])
    with pytest.raises(CocomixError, match="no text to read"):
        read_text(usable, "", 10)


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


def test_a_model_that_has_no_concept_at_some_tokens_is_refused(usable):
    config = copy.deepcopy(usable.model.config)
    config.concept_every = 2
    with pytest.raises(CocomixError, match="a concept after every 2 tokens alone.*--corpus"):
        read_text(usable._replace(model=CoCoMixForCausalLM(config)), "some text", 100)
