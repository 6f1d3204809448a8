import pytest
from command_helpers import record_call

from cocomix.cli import main
from cocomix.inference.concepts import Request


@pytest.fixture
def looked_at(monkeypatch):
    return record_call(monkeypatch, "cocomix.inference.concepts.run")


def test_a_text_file_is_enough(looked_at):
    assert main(["concepts", "run", "text.txt"]) == 0
    [[model, request]] = looked_at
    assert model == "run" and request == Request(
        text_file="text.txt",
        text=None,
        concepts=(),
        names=(),
        corpus=None,
        corpus_tokens=100_000,
        max_tokens=1024,
        teacher_config=None,
        out="concepts.html",
        per_token=False,
    )


def test_options_are_handed_on(looked_at):
    which = ["--text", "the", "--concept", "3", "--concept", "commas", "--name", "3=commas", "--name", "4="]
    where = ["--corpus", "data", "--corpus-tokens", "9", "--max-tokens", "5", "--teacher-config", "c.yaml"]
    assert main(["concepts", "run", *which, *where, "--out", "page.html", "--per-token"]) == 0
    assert looked_at[0][1] == Request(
        text_file=None,
        text="the",
        concepts=("3", "commas"),
        names=("3=commas", "4="),
        corpus="data",
        corpus_tokens=9,
        max_tokens=5,
        teacher_config="c.yaml",
        out="page.html",
        per_token=True,
    )
