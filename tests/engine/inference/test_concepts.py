"""`cocomix concepts`: what a text's tokens show, the survey of a corpus, names, and the page."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
from run_helpers import LATENTS, SEQ_LEN
from usable_helpers import error_of, world_of_runs

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.inference.concept_reading import agreement, read_text
from cocomix.inference.concepts import Request, run
from cocomix.inference.loading import load_teacher, load_usable

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


def test_the_page_is_there_before_anything_is_printed(world, tmp_path, monkeypatch):
    class Unread(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Unread())
    with pytest.raises(BrokenPipeError):
        run(world.folder / "run", Request(text=TEXT, out=str(tmp_path / "page.html")))
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_a_text_that_is_no_utf_8_is_refused(world):
    with pytest.raises(CocomixError, match="--text is not UTF-8"):
        run(world.folder / "run", Request(text="a\udcffb"))


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


def test_what_a_killed_start_left_half_written_is_swept(world, tmp_path):
    run, ended = tmp_path / "run", 2**22 + 1  # more than any process's number
    shutil.copytree(world.folder / "run", run)
    page = tmp_path / "page.html"
    half = [path.with_name(f".{path.name}.0123abcd.{ended}.part") for path in (page, run / "model/concept_names.json")]
    for path in half:
        path.parent.mkdir(exist_ok=True)
        path.write_text("half")
    more = ["--concept", "7", "--name", "7=seven", "--corpus-tokens", "320", "--out", str(page)]
    assert main(["concepts", str(run), *more]) == 0
    assert page.exists() and not any(path.exists() for path in half)


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
