"""Work goes on where nobody reads what it says, and whatever it says can be shown."""

import io
import os
import subprocess
import sys

import pytest
from terminal_helpers import terminal
from tqdm import tqdm

from cocomix.core.output import any_text_can_be_shown, lost_output_is_no_error, printable
from cocomix.training.metrics import progress_bar

PROGRAM = """
import sys
from cocomix.core.output import lost_output_is_no_error
with lost_output_is_no_error():
    for number in range(5):
        print("line", number, flush=True)
        print("line", number, file=sys.stderr)
open(sys.argv[1], "w").write("done")
"""


def closed_pipe():
    reading, writing = os.pipe()
    os.close(reading)
    return writing


@pytest.mark.parametrize("where", ["pipe", "full disk", "closed", "both"])
def test_what_cannot_be_written_is_lost_and_the_work_is_done(tmp_path, where):
    streams = {
        "pipe": lambda: {"stdout": closed_pipe(), "stderr": closed_pipe()},
        "full disk": lambda: {"stdout": open("/dev/full", "w"), "stderr": open("/dev/full", "w")},
        "closed": lambda: {"preexec_fn": lambda: os.close(1)},
        "both": lambda: {"stdout": closed_pipe(), "stderr": open("/dev/full", "w")},
    }[where]()
    done = subprocess.run([sys.executable, "-c", PROGRAM, tmp_path / "file"], **streams, timeout=60)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == "done"


def test_what_can_be_written_is_and_the_streams_come_back(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    with lost_output_is_no_error():
        print("a")
        assert sys.stdout.isatty() is False and sys.stdout is not out
    print("b")
    assert sys.stdout is out and out.getvalue() == "a\nb\n"


def test_control_characters_are_spelled_out_but_for_tabs_and_ends_of_lines():
    assert printable("\x1b[2J\x9b31m\x7f\x00\a\b\v\f") == r"\x1b[2J\x9b31m\x7f\x00\x07\x08\x0b\x0c"
    assert printable("a\tb\nc\r\nd\re é – 你") == "a\tb\nc\r\nd\\x0de é – 你"


def test_a_terminal_is_told_nothing_by_what_it_shows(monkeypatch):
    with terminal(monkeypatch) as shown:
        before = sys.stdout, sys.stderr
        with any_text_can_be_shown():
            print("a\x1b]0;title\x07", "\x9b2Jb", sep="\n")
            print("c\x1b[1mc", file=sys.stderr)
        assert shown() == "a\\x1b]0;title\\x07\n\\x9b2Jb\nc\\x1b[1mc\n"
        assert (sys.stdout, sys.stderr) == before


def test_bars_are_drawn_in_place_whatever_they_are_called(monkeypatch):
    with terminal(monkeypatch) as shown, any_text_can_be_shown():
        assert sys.stderr.isatty()
        with progress_bar("run\x1b[2J\rgone", 3, 0, True) as bar:
            bar.mininterval = 0
            bar.update()
            tqdm.write("a\x1bline", file=sys.stderr)
            bar.update()
        drawn = shown()
    assert "\rrun\\x1b[2J\\x0dgone:  33%" in drawn and "\x1b" not in drawn and "a\\x1bline\n" in drawn


def test_a_file_gets_what_was_written(monkeypatch, tmp_path):
    with open(tmp_path / "file", "w", encoding="utf-8") as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        with any_text_can_be_shown():
            print("a\x1b[1m")
    assert (tmp_path / "file").read_bytes() == b"a\x1b[1m\n"


@pytest.mark.parametrize(
    "encoding, shown", [("ascii", rb"\xe9 \u2013 \udcff"), ("utf-8", b"\xc3\xa9 \xe2\x80\x93 \\udcff")]
)
def test_what_an_encoding_lacks_is_spelled_out(monkeypatch, tmp_path, encoding, shown):
    with open(tmp_path / "file", "w", encoding=encoding) as file, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", file)
        patch.setattr(sys, "stderr", None)  # closed when the interpreter started
        with any_text_can_be_shown():
            print("é – \udcff")
    assert (tmp_path / "file").read_bytes() == shown + b"\n"


def test_lost_output_stays_lost_behind_a_terminal(monkeypatch):
    with terminal(monkeypatch) as shown:
        with any_text_can_be_shown(), lost_output_is_no_error():
            print("a\x1b")
            sys.stdout.is_broken = True
            kept = sys.stdout
        assert sys.stdout is kept and shown() == "a\\x1b\n"
