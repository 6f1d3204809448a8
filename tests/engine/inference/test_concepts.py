"""`cocomix concepts`: what a text's tokens show, the survey of a corpus, names, and the page."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from run_helpers import LATENTS, SEQ_LEN, World
from usable_helpers import error_of, world_of_runs

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.data.token_files import TokenFiles
from cocomix.inference import concept_survey
from cocomix.inference.concept_names import add_names, read_names
from cocomix.inference.concept_page import visible
from cocomix.inference.concept_survey import Corpus, Followed, Histogram, survey
from cocomix.inference.concepts import (
    agreement,
    chosen_concepts,
    compress_norms,
    direct_tokens,
    ignored,
    make_card,
    measured_tokens,
    read_text,
)
from cocomix.inference.loading import load_teacher, load_usable
from cocomix.inference.steering import steer

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


# --- a text


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


def test_concepts_that_were_asked_for_come_first_and_then_the_main_ones(reading):
    counts = np.bincount(reading.main, minlength=LATENTS)
    chosen = chosen_concepts(reading, [63, 2], n=3)
    assert chosen[:2] == [63, 2] and 3 <= len(chosen) <= 5
    others = [concept for concept in chosen[2:]]
    assert [counts[concept] for concept in others] == sorted((counts[c] for c in others), reverse=True)
    assert counts[others[0]] == counts.max() or counts[[63, 2]].max() == counts.max()


# --- a corpus


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


# --- what a concept does


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


def test_tokens_show_their_white_space_and_are_no_html():
    assert visible(" <a\n\t") == "·&lt;a↵⇥" and visible("") == "∅"


def test_norms_are_those_of_the_rows_and_small_ones_count_as_ignored(usable):
    norms = compress_norms(usable.model)
    assert norms[11].item() == pytest.approx(usable.model.transformer.compress_layer.weight[11].norm().item())
    assert ignored(np.array([1.0, 1.0, 2.0, 0.05, 0.15])).tolist() == [False, False, False, True, False]


def test_a_card_counts_the_text_and_the_teachers_labels(world, usable, reading):
    concept = int(next(label for label in reading.labels.ravel() if label >= 0))
    found = survey(usable.model, Corpus(world.folder / "data", usable.tokenizer, SEQ_LEN, 64), [concept])
    card = make_card(usable, concept, reading, found)
    kept = [concept in row for row in reading.concepts.tolist()]
    labelled = [concept in row for row in reading.labels.tolist()]
    assert (card.in_text, card.labelled) == (sum(kept), sum(labelled)) and card.labelled > 0
    assert card.agreed == sum(a and b for a, b in zip(kept, labelled, strict=True))


# --- names


def test_names_given_to_an_unfinished_run_stay_when_it_goes_on_and_ends(world, tmp_path, capsys):
    assert world.train("named", f"train.tokens={4 * 8 * SEQ_LEN}") == 0
    capsys.readouterr()
    run = world.folder / "named"
    shutil.move(run / "model", tmp_path / "model")  # as it was before its end
    text = [str(world.folder / "text/00.txt"), "--max-tokens", "8", "--out", str(tmp_path / "page.html")]
    assert main(["concepts", str(run), *text, "--name", "5=the end"]) == 0
    assert read_names(run) == {5: "the end"}
    shutil.move(tmp_path / "model", run / "model")
    assert main(["concepts", str(run), *text, "--name", "7=a start"]) == 0
    assert read_names(run) == {5: "the end", 7: "a start"} and not (run / "model/concept_names.json").exists()


def test_names_are_kept_beside_the_model_and_can_be_changed_and_forgotten(tmp_path):
    assert read_names(tmp_path) == {}
    assert add_names(tmp_path, ["12=quotes", " 3 = of  a list "], 40) == {3: "of a list", 12: "quotes"}
    assert json.loads((tmp_path / "concept_names.json").read_text()) == {"3": "of a list", "12": "quotes"}
    assert add_names(tmp_path, ["12=", "3=lists"], 40) == read_names(tmp_path) == {3: "lists"}
    for text, message in (
        ("40=x", "concepts 0 to 39"),
        ("x=y", "expected ID=NAME"),
        ("7", "expected ID=NAME"),
        ("7=lists", "concept 3 has this name already"),
        ("7=8", "cannot be a number"),
    ):
        with pytest.raises(CocomixError, match=message):
            add_names(tmp_path, [text], 40)
    assert read_names(tmp_path) == {3: "lists"}


# --- the command and its page


class Page(HTMLParser):
    """Tags that are open, the text of each kind, and whatever would be fetched from elsewhere."""

    VOID = {"meta", "br", "hr", "rect", "line"}

    def __init__(self, content):
        super().__init__()
        self.open, self.classes, self.fetched, self.text = [], [], [], []
        self.feed(content)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.classes += (attributes.get("class") or "").split()
        self.fetched += [value for name, value in attributes.items() if name in ("src", "href") and value[0] != "#"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def test_a_texts_concepts_are_printed_and_shown_on_one_page(world, tmp_path, capsys):
    shutil.copytree(world.folder / "run", tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT + " <b>&amp;</b>")
    usable = load_usable(tmp_path / "run")
    reading = read_text(usable, (tmp_path / "text.txt").read_text(), 1000, load_teacher(tmp_path / "run", None, usable))
    main_concept = int(np.bincount(reading.main).argmax())
    out = tmp_path / "page.html"
    assert (
        main(
            [
                "concepts",
                str(tmp_path / "run"),
                str(tmp_path / "text.txt"),
                "--name",
                f"{main_concept}=<quotes>",
                "--corpus-tokens",
                "320",
                "--per-token",
                "--out",
                str(out),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert f"{len(reading.ids)} tokens of text" in printed and agreement(reading) in printed
    assert f'{main_concept} "<quotes>"' in printed and printed.endswith(f"page: {out}\n")
    first = printed.splitlines()[0]
    assert first.startswith(repr(reading.tokens[0])) and f"{reading.weights[0, 0]:.2f}" in first
    assert [label for label in reading.labels[0] if label >= 0] == [
        int(label.split()[0]) for label in first.split("labels: ")[1].split(", ")
    ]
    content = out.read_text()
    page = Page(content)
    shown = " ".join(page.text)
    assert page.fetched == [] and "http" not in content
    assert page.classes.count("t") == len(reading.ids) and page.classes.count("tip") == len(reading.ids)
    assert page.classes.count("card") == min(24, len(set(reading.main.tolist())))
    assert "<quotes>" in shown and "&lt;quotes&gt;" in content and "<quotes>" not in content
    assert "320 tokens" in shown and "What the compress layer uses" in shown
    assert page.classes.count("window") == (len(reading.ids) - 1) // SEQ_LEN
    weights = [json.loads(found) for found in re.findall(r"data-w='(.*?)'", content)]
    assert all(0 < value <= 0.75 for values in weights for value in values.values())
    assert {concept for values in weights for concept in values} <= {str(c) for c in range(LATENTS)}


def test_a_concept_can_be_looked_at_without_a_text_and_named_without_either(world, tmp_path, capsys):
    shutil.copytree(world.folder / "run", tmp_path / "run")
    run, page = str(tmp_path / "run"), tmp_path / "page.html"
    assert main(["concepts", run, "--name", "5=commas"]) == 0
    assert capsys.readouterr().out == '5 "commas"\n' and not page.exists()
    assert (
        main(
            [
                "concepts",
                run,
                "--concept",
                "commas",
                "--concept",
                "9",
                "--corpus",
                str(world.folder / "text"),
                "--corpus-tokens",
                "64",
                "--out",
                str(page),
            ]
        )
        == 0
    )
    assert '5 "commas"' in capsys.readouterr().out
    assert Page(page.read_text()).classes.count("card") == 2
    assert main(["concepts", run, "--name", "5="]) == 0
    assert capsys.readouterr().out == "no concept has a name\n"


def test_without_the_teacher_the_page_has_no_labels_and_says_why(world, tmp_path, capsys):
    shutil.copytree(world.folder / "run", tmp_path / "run")
    (tmp_path / "run/run.json").unlink()
    (tmp_path / "text.txt").write_text(TEXT)
    page = tmp_path / "page.html"
    assert main(["concepts", str(tmp_path / "run"), str(tmp_path / "text.txt"), "--out", str(page)]) == 0
    printed = capsys.readouterr().out
    assert "without the teacher's labels: " in printed and "--teacher-config" in printed
    assert "teacher:" not in page.read_text() and "text.txt" in page.read_text()  # the text is its own corpus
    assert (
        main(
            [
                "concepts",
                str(tmp_path / "run"),
                str(tmp_path / "text.txt"),
                "--out",
                str(page),
                "--teacher-config",
                str(world.config),
            ]
        )
        == 0
    )
    assert "teacher:" in page.read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nofile.txt"], "there is no file nofile.txt"),
        ([], "nothing to look at"),
        (["--concept", str(LATENTS)], f"no concept {LATENTS}: this model has the concepts 0 to {LATENTS - 1}"),
        (["--concept", "quotes"], "'quotes' is neither"),
        (["--name", f"{LATENTS}=x"], f"concepts 0 to {LATENTS - 1}"),
        (["--text", ""], "no text to read concepts from"),
        (["--text", "the", "--corpus", "nowhere"], "nowhere"),
        (["--text", "the", "--teacher-config", "nowhere.yaml"], "nowhere.yaml"),
        (["README.md", "--text", "the"], "give one of them"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_in_one_line(world, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["concepts", str(world.folder / "run"), *arguments]) == 2
    assert message in error_of(capsys, "concepts")
    assert not list(tmp_path.iterdir())


def test_other_models_and_other_files_are_refused(world, tmp_path, capsys):
    assert main(["concepts", str(world.folder / "plain"), "--text", "the"]) == 2
    assert "mixes no concepts in (a cocomix model with mixing=none)" in error_of(capsys, "concepts")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert main(["concepts", str(world.folder / "run"), str(tmp_path / "binary")]) == 2
    assert "cannot be read as UTF-8" in error_of(capsys, "concepts")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs a browser")
def test_a_browser_draws_the_page_and_a_click_colours_one_concept(world, tmp_path):
    page = tmp_path / "page.html"
    assert (
        main(["concepts", str(world.folder / "run"), "--text", TEXT, "--corpus-tokens", "320", "--out", str(page)]) == 0
    )
    click = 'buttons[0].click(); document.title = [...tokens].map(t => t.style.getPropertyValue("--a"))'
    page.write_text(page.read_text().replace("</body>", f"<script>{click}</script></body>"))
    done = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    shown = [float(alpha) for alpha in re.search(r"<title>(.*?)</title>", done.stdout)[1].split(",")]
    concept = re.search(r'button data-c="(\d+)"', page.read_text())[1]
    weights = [json.loads(found).get(concept, 0) for found in re.findall(r"data-w='(.*?)'", page.read_text())]
    assert shown == weights and 0 < sum(weight > 0 for weight in weights) < len(weights)
