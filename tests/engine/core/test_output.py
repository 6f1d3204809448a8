"""Work goes on where nobody reads what it says."""

import io
import os
import subprocess
import sys

import pytest

from cocomix.core.output import lost_output_is_no_error

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
