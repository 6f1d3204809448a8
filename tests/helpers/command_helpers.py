"""Calling commands in this process, and what they must say where the input does not fit."""

from pathlib import Path

from run_helpers import World

from cocomix.cli import main


def world_of_teachers(folder: Path) -> World:
    """A world with a teacher and its SAE, and a second, wider pair that fits nothing of the first."""
    world = World(folder)
    world.add_teacher()
    world.add_teacher("teacher-wide", "sae-wide", width=48)
    return world


def call(world: World, command: str, *arguments: str) -> int:
    """A command with the world's config; its exit code. OUT in the arguments stands for the world's folder."""
    return main([command, str(world.config), *(text.replace("OUT", str(world.folder)) for text in arguments)])


def one_line(capsys, command: str) -> str:
    """The message on standard error, which must be a single line without a traceback, notes aside."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip() and "|" not in line]  # |: bars
    lines = [line for line in lines if not line.startswith("note: ")]
    assert len(lines) == 1 and lines[0].startswith(f"cocomix {command}: error: "), lines
    return lines[0]


def assert_refused(world: World, capsys, command: str, arguments: list[str], message: str) -> None:
    """The command ends with exit code 2 and one line that holds `message`, and leaves no file behind."""
    before = world.tree()
    assert call(world, command, *arguments) == 2
    assert message in one_line(capsys, command)
    assert world.tree() == before


def record_call(monkeypatch, target: str, result=None) -> list[tuple]:
    """Replace a function by one that does nothing; the positional arguments of its calls."""
    calls = []
    monkeypatch.setattr(target, lambda *arguments: (calls.append(arguments), result)[1])
    return calls
