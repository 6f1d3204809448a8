import argparse

import pytest
from command_helpers import one_line, record_call

from cocomix.cli import main
from cocomix.commands import eval as eval_command
from cocomix.commands.eval import TASKS, TEXTS, TOKEN_FILES
from cocomix.inference.rolling import RollingOptions
from cocomix.inference.tasks import TaskOptions

# A value for each option that only some ways take.
VALUES = {
    "--data": "folder",
    "--windows": "0",
    "--seq-len": "9",
    "--text": "page.txt",
    "--text-key": "body",
    "--stride": "3",
    "--tasks": "wikitext",
    "--task-folder": "folder",
    "--shots": "0",
    "--limit": "2",
    "--out": "folder",
}
WAYS = {"token files": TOKEN_FILES, "texts": TEXTS, "tasks": TASKS}


@pytest.fixture
def evaluated(monkeypatch):
    """Calls of the three evaluations, by name."""
    return {
        "token files": record_call(monkeypatch, "cocomix.inference.evaluate.evaluate_checkpoint"),
        "texts": record_call(monkeypatch, "cocomix.inference.rolling.evaluate_texts"),
        "tasks": record_call(monkeypatch, "cocomix.inference.tasks.evaluate_tasks"),
    }


def asking_for(way):
    return [way.asked_by, VALUES[way.asked_by]] if way.asked_by else []


def test_every_option_belongs_to_a_way_to_evaluate():
    parser = argparse.ArgumentParser(add_help=False)
    eval_command.add_arguments(parser)
    options = [name for action in parser._actions for name in action.option_strings]
    taken = {name for way in WAYS.values() for name in way.takes}
    assert sorted(options) == sorted(taken | {"--batch"}) and taken == set(VALUES)


@pytest.mark.parametrize("name", WAYS)
def test_each_way_takes_its_options_together(evaluated, name):
    way = WAYS[name]
    given = [text for option in way.takes for text in (option, VALUES[option])]
    assert main(["eval", "run", *given, "--batch", "3"]) == 0
    assert [key for key, calls in evaluated.items() if calls] == [name]


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (name, option)
        for name, way, asks_for_another in (
            ("token files", TOKEN_FILES, ("--text", "--tasks")),
            ("texts", TEXTS, ("--tasks",)),
            ("tasks", TASKS, ()),
        )
        for option in VALUES
        if option not in way.takes + asks_for_another
    ],
)
def test_an_option_that_would_not_be_read_is_refused(evaluated, capsys, name, option):
    assert main(["eval", "run", *asking_for(WAYS[name]), option, VALUES[option]]) == 2
    message = one_line(capsys, "eval").removeprefix("cocomix eval: error: ")
    if name == "token files":
        assert message == f"{option} goes with {'--text' if option in TEXTS.takes else '--tasks'} only"
    else:
        assert message == f"{option} does not go with {WAYS[name].asked_by}: leave one of the two out"
    assert not any(evaluated.values())


def test_token_files_are_the_default_checkpoint_by_checkpoint(evaluated):
    assert main(["eval", "one", "two"]) == 0
    assert main(["eval", "one", "--data", "d", "--seq-len", "9", "--windows", "4", "--batch", "3"]) == 0
    assert evaluated["token files"] == [
        ("one", None, None, 8, 0),
        ("two", None, None, 8, 0),
        ("one", "d", 9, 3, 4),
    ]


def test_texts(evaluated):
    assert main(["eval", "one", "two", "--text", "a", "--text", "b"]) == 0
    assert main(["eval", "one", "--text=a", "--text-key=k", "--seq-len=9", "--stride=2", "--batch=3"]) == 0
    assert evaluated["texts"] == [
        (["one", "two"], RollingOptions(("a", "b"), "text", None, None, 8)),
        (["one"], RollingOptions(("a",), "k", 9, 2, 3)),
    ]


def test_tasks_are_named_once_each(evaluated):
    assert main(["eval", "one", "two", "--tasks", "a, b,,a"]) == 0
    assert main(["eval", "one", "--tasks=a", "--task-folder=f", "--shots=0", "--limit=2", "--batch=3", "--out=o"]) == 0
    assert evaluated["tasks"] == [
        (["one", "two"], TaskOptions(("a", "b"), None, None, None, 8, None)),
        (["one"], TaskOptions(("a",), "f", 0, 2, 3, "o")),
    ]
