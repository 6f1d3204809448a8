"""The survey of a corpus: how often concepts fire, and where most."""

import copy
import gzip
import shutil

import numpy as np
import pytest
import torch
from run_helpers import LATENTS, SEQ_LEN, World
from usable_helpers import world_of_runs

from cocomix import CoCoMixForCausalLM
from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.data.token_files import TokenFiles
from cocomix.inference import concept_survey
from cocomix.inference.concept_survey import Corpus, Followed, Histogram, survey
from cocomix.inference.loading import load_usable

TEXT = "the quick brown cat jumps over a lazy dog and sleeps under the tree, or eats."
K = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return world_of_runs(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def usable(world):
    return load_usable(world.folder / "run")


def by_hand(usable, corpus):
    """Fired counts, and every place of every concept as (weight, window, position)."""
    fired, places = np.zeros(LATENTS, dtype=int), {concept: [] for concept in range(LATENTS)}
    windows = [row for rows in corpus.batches() for row in rows]
    for number, window in enumerate(windows):
        out = usable.model(torch.from_numpy(window)[None])
        for t in range(len(window)):
            for concept, weight in zip(
                out.concept_indices[0, t].tolist(), out.concept_values[0, t].tolist(), strict=True
            ):
                fired[concept] += 1
                places[concept].append((weight, number, t))
    return windows, fired, places


def test_a_survey_counts_and_finds_the_strongest_place_of_each_window(world, usable):
    corpus = Corpus(world.folder / "data", usable.tokenizer, SEQ_LEN, max_tokens=20 * SEQ_LEN, batch=3)
    windows, fired, places = by_hand(usable, corpus)
    assert len(windows) == 20
    val = TokenFiles.open(world.folder / "data").split("val")
    assert np.array_equal(np.stack(windows), val.windows(range(20), SEQ_LEN))
    busiest, *_, never = np.argsort(-fired).tolist()
    found = survey(usable.model, corpus, range(LATENTS), n_contexts=5)
    assert fired[never] == 0 < fired[busiest]
    assert found.n_tokens == 20 * SEQ_LEN and np.array_equal(found.fired, fired) and fired.sum() == K * 20 * SEQ_LEN
    for concept in range(LATENTS):
        best = {}
        for weight, number, t in places[concept]:
            best[number] = max(best.get(number, (-np.inf, 0)), (weight, -t))
        expected = sorted(((weight, number, -t) for number, (weight, t) in best.items()), reverse=True)[:5]
        contexts = found.followed[concept].contexts
        assert [context.weight for context in contexts] == pytest.approx([w for w, *_ in expected], abs=1e-5)
        for context in contexts:  # equal weights may come in any order
            places_like_it = [
                (weight, number)
                for number, (weight, t) in best.items()
                if [*context.ids, *context.after] == windows[number][: -t + 9].tolist()
            ]
            assert any(weight == pytest.approx(context.weight, abs=1e-5) for weight, _ in places_like_it)
        assert found.followed[concept].histogram.counts.sum() == fired[concept]
        assert found.followed[concept].total == pytest.approx(sum(w for w, *_ in places[concept]), abs=1e-3)


def test_places_are_tokens_where_only_some_have_a_concept(world, usable):
    config = copy.deepcopy(usable.model.config)
    config.concept_every = 3
    model = CoCoMixForCausalLM(config).eval()
    model.load_state_dict(usable.model.state_dict())
    corpus = Corpus(world.folder / "data", usable.tokenizer, SEQ_LEN, max_tokens=6 * SEQ_LEN, batch=2)
    found = survey(model, corpus, range(LATENTS), n_contexts=50)
    assert found.n_tokens == 6 * (SEQ_LEN // 3) and found.fired.sum() == K * found.n_tokens
    windows = [row for rows in corpus.batches() for row in rows]
    for concept, followed in found.followed.items():
        for place in followed.contexts:
            assert len(place.ids) % 3 == 0  # the text up to it ends with a token that has a concept
            [window] = [w for w in windows if w[: len(place.ids)].tolist() == place.ids.tolist()]
            assert concept in model(torch.from_numpy(window)[None]).concept_indices[0, len(place.ids) // 3 - 1]


def test_a_corpus_may_be_a_text_or_a_folder_and_ends_after_so_many_tokens(world, usable, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = Corpus(tmp_path / "a.txt", usable.tokenizer, SEQ_LEN, max_tokens=1000)
    ids = np.concatenate([row for rows in corpus.batches() for row in rows])
    assert ids.tolist() == [*usable.tokenizer(TEXT)["input_ids"], usable.tokenizer.eos_token_id]
    for max_tokens in (3, SEQ_LEN, 100, 1000):
        corpus = Corpus(world.folder / "text", usable.tokenizer, SEQ_LEN, max_tokens)
        assert sum(rows.size for rows in corpus.batches()) == max_tokens
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(CocomixError, match="holds no text"):
        survey(usable.model, Corpus(tmp_path / "empty.txt", usable.tokenizer, SEQ_LEN, 10), [1])
    with pytest.raises(CocomixError, match="nowhere"):
        Corpus(tmp_path / "nowhere", usable.tokenizer, SEQ_LEN, 10)


def test_a_corpus_of_any_kind_is_read_and_what_is_left_out_of_it_is_said(usable, tmp_path, capsys):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(TEXT.encode("utf-16")))
    (tmp_path / "b.png").write_bytes(b"\x89PNG")
    corpus = Corpus(tmp_path, usable.tokenizer, SEQ_LEN, max_tokens=1000)
    ids = np.concatenate([row for rows in corpus.batches() for row in rows])
    assert ids.tolist() == [*usable.tokenizer(TEXT)["input_ids"], usable.tokenizer.eos_token_id]
    assert capsys.readouterr().out == f"left out of {tmp_path}: 1 x image ({tmp_path}/b.png)\n"


def test_token_files_of_another_tokenizer_are_refused(world, usable, tmp_path):
    other = World(tmp_path)
    shutil.rmtree(tmp_path / "data")
    (tmp_path / "text/extra.txt").write_text("entirely different words zebra xylophone " * 300)
    assert main(["data", str(other.config)]) == 0
    with pytest.raises(CocomixError, match="another tokenizer than the model's"):
        Corpus(tmp_path / "data", usable.tokenizer, SEQ_LEN, 100)


def test_a_histogram_loses_no_number_and_keeps_its_order_however_the_range_grows():
    draw = np.random.default_rng(0)
    parts = [draw.normal(5, 0.1, 40), draw.normal(-300, 50, 70), np.array([1e4, 5.0, -1e-3]), np.zeros(0), np.zeros(9)]
    histogram = Histogram()
    for part in parts:
        histogram.add(part)
    values = np.concatenate(parts)
    edges = histogram.low + histogram.width * np.arange(len(histogram.counts) + 1)
    assert edges[0] <= values.min() and values.max() <= edges[-1] and len(histogram.counts) == concept_survey._BINS
    expected = np.histogram(values, bins=edges)[0]
    assert histogram.counts.sum() == len(values)
    assert np.abs(np.cumsum(histogram.counts) - np.cumsum(expected)).max() <= 1  # a number may sit on an edge
    same = Histogram()
    same.add(np.full(5, 2.0))
    assert same.counts.sum() == 5


def test_the_places_kept_for_a_concept_do_not_grow_with_the_corpus():
    followed, draw = Followed(n_contexts=3), np.random.default_rng(0)
    every = []
    for number in range(0, 500, 5):
        weights, rows = draw.random(40), draw.integers(0, 5, 40)
        followed.add(weights, rows, draw.integers(0, 6, 40), np.zeros((5, 6), dtype=np.int64), number)
        every += [max(weights[rows == row], default=0) for row in range(5)]
    assert [context.weight for context in followed.contexts] == sorted(every, reverse=True)[:3]
    assert len(followed._heap) == 3
