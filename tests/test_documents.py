"""The documents: links lead somewhere, files that are named exist, and commands are as the command line knows them."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("engine", "kernels", "tests", "configs", "benchmarks")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(file for name in FOLDERS for file in (ROOT / name).rglob("*.md"))])
HISTORY = ("CHANGELOG.md", "LOG.md")  # these name what is gone

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./*<>-]*")
CODE_SPAN = re.compile(r"`([^`]+)`")
COMMAND = re.compile(r"(?:^|(?<=[\s/]))cocomix ([a-z]+)([^#|]*)")


def documents(but=()):
    return [pytest.param(file, id=str(file.relative_to(ROOT))) for file in DOCUMENTS if file.name not in but]


def fenced_and_plain(text: str) -> tuple[list[str], list[str]]:
    """Lines inside code fences, with continued lines joined, and all others."""
    fenced, plain, inside = [], [], False
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        else:
            (fenced if inside else plain).append(line)
    return fenced, plain


def anchors(file: Path) -> set[str]:
    """What links to a document's headings look like, as GitHub makes them."""
    headings = [line.lstrip("#").strip() for line in fenced_and_plain(file.read_text())[1] if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def code_in(file: Path) -> list[str]:
    """Lines of code, fenced or inline."""
    fenced, plain = fenced_and_plain(file.read_text())
    return [*fenced, *CODE_SPAN.findall("\n".join(plain))]


def broken_links(file: Path) -> list[str]:
    """Links to files or headings that do not exist."""
    broken = []
    for target in LINK.findall("\n".join(fenced_and_plain(file.read_text())[1])):
        if re.match(r"[a-z]+:", target):  # the web
            continue
        path, _, anchor = target.partition("#")
        other = (file.parent / path) if path else file
        if not other.exists() or (anchor and anchor not in anchors(other)):
            broken.append(target)
    return broken


def missing_files(file: Path) -> list[str]:
    """Files that code names and that do not exist. WORDS and <words> stand for any name."""
    missing = []
    for code in code_in(file):
        for name in NAMED_FILE.findall(code):
            pattern = re.sub(r"<\w+>|\b[A-Z]{2,}\b(?!\.md)", "*", name).rstrip("./")
            if not any(ROOT.glob(pattern)):
                missing.append(name)
    return missing


@functools.cache
def help_of(command: str) -> str | None:
    """What `cocomix COMMAND --help` prints, None where there is no such command."""
    run = subprocess.run([sys.executable, "-m", "cocomix", command, "--help"], capture_output=True, text=True)
    return run.stdout if run.returncode == 0 else None


def unknown_commands(file: Path) -> list[str]:
    """Commands that code calls and `cocomix` does not know, and options that a command does not have."""
    unknown = []
    for code in code_in(file):
        for command, rest in COMMAND.findall(code):
            known = help_of(command)
            if known is None:
                unknown.append(command)
                continue
            options = sorted(set(re.findall(r"(?<=\s)--[a-z-]+", rest)))
            unknown += [f"{command} {option}" for option in options if not re.search(rf"{option}\b(?!-)", known)]
    return unknown


@pytest.mark.parametrize("file", documents())
def test_links_lead_somewhere(file):
    assert broken_links(file) == []


@pytest.mark.parametrize("file", documents(but=HISTORY))
def test_files_and_commands_that_are_named_exist(file):
    assert missing_files(file) == []
    assert unknown_commands(file) == []


def test_what_is_wrong_would_be_seen(tmp_path):
    file = tmp_path / "some.md"
    file.write_text(
        "# A title\n[one](#a-title) [two](#another) [three](gone.md) [web](https://example.com)\n"
        "`tests/conftest.py`, `engine/<room>/gone.py`, `configs/openwebtext/SIZE.yaml`, `benchmarks/gone.py --fast`\n"
        "```\ncocomix train CONFIG --resume\ncocomix train CONFIG \\\n    --again\ncocomix trian CONFIG\n```\n"
    )
    assert broken_links(file) == ["#another", "gone.md"]
    assert missing_files(file) == ["engine/<room>/gone.py", "benchmarks/gone.py"]
    assert unknown_commands(file) == ["train --again", "trian"]
