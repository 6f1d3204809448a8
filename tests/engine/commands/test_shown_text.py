"""What a terminal is told by names, texts and messages that hold its control characters: nothing."""

import pytest
from run_helpers import World
from terminal_helpers import terminal
from usable_helpers import make_run

from cocomix.cli import main

TITLE, CLEAR = "\x1b]0;owned\x07", "\x9b2J"
SHOWN_TITLE, SHOWN_CLEAR = r"\x1b]0;owned\x07", r"\x9b2J"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    make_run(world)
    return world


@pytest.fixture
def called(monkeypatch):
    """Calls a command on a terminal; returns its exit code and what the terminal was told."""

    def call(*arguments):
        with terminal(monkeypatch) as told:
            try:
                code = main(list(arguments))
            except SystemExit as leave:
                code = leave.code
            return code, told()

    return call


def test_generated_text(world, called):
    code, told = called("generate", str(world.folder / "run"), "--prompt", f"a{TITLE}{CLEAR}b", "--max-new-tokens", "2")
    assert code == 0 and told.startswith(f"a{SHOWN_TITLE}{SHOWN_CLEAR}b") and not set(told) & {"\x1b", "\x9b", "\x07"}


def test_names_of_concepts(world, called):
    code, told = called("concepts", str(world.folder / "run"), "--name", f"3=a{TITLE}{CLEAR}")
    assert (code, told) == (0, f'3 "a{SHOWN_TITLE}{SHOWN_CLEAR}"\n')
    code, told = called("generate", str(world.folder / "run"), "--prompt", "the", "--steer", "quotes=0")
    assert code == 2 and told.endswith(f"names: a{SHOWN_TITLE}{SHOWN_CLEAR}\n")


def test_names_of_runs_in_bars_and_messages(world, called):
    run = f'train.run="{world.folder}/r{SHOWN_TITLE}{SHOWN_CLEAR}"'  # as YAML spells them
    code, told = called("train", str(world.config), run, "model.mixing=none", "train.tokens=256")
    assert code == 0, told
    assert not set(told) & {"\x1b", "\x9b", "\x07"}
    assert f"\rr{SHOWN_TITLE}{SHOWN_CLEAR}: 100%" in told  # the bar
    assert f"r{SHOWN_TITLE}{SHOWN_CLEAR}: validation perplexity" in told


@pytest.mark.parametrize("arguments", [["eval", f"no{TITLE}"], ["eval", "run", f"--no{TITLE}"], [f"no{TITLE}"]])
def test_errors(called, arguments):
    code, told = called(*arguments)
    assert code == 2 and SHOWN_TITLE in told and "\x1b" not in told and "\x07" not in told
