"""When threads wait passively: where others are busy, unless the user has decided or there is one thread alone."""

import os
import subprocess
import sys

import psutil
import pytest

from cocomix.core.threads import wait_passively_on_busy_cores


@pytest.fixture
def cores(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)

    def busy(number):
        monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 100 * number / 8)

    yield busy
    os.environ.pop("OMP_WAIT_POLICY", None)


def test_threads_sleep_where_others_are_busy(cores, capsys):
    cores(3.2)
    wait_passively_on_busy_cores()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert "others keep 3.2 of 8 cores busy: threads sleep while they wait" in capsys.readouterr().err


def test_nothing_is_said_where_it_comes_too_late(cores, monkeypatch, capsys):
    cores(8)
    monkeypatch.setitem(sys.modules, "torch", object())
    wait_passively_on_busy_cores()
    assert "OMP_WAIT_POLICY" not in os.environ and capsys.readouterr().err == ""


def test_threads_spin_on_quiet_cores(cores, capsys):
    cores(0.2)
    wait_passively_on_busy_cores()
    assert "OMP_WAIT_POLICY" not in os.environ and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "choice", [("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "ACTIVE"), ("GOMP_SPINCOUNT", "9"), ("KMP_BLOCKTIME", "0")]
)
def test_what_the_user_has_chosen_stays(cores, monkeypatch, capsys, choice):
    cores(8)
    monkeypatch.setenv(*choice)
    wait_passively_on_busy_cores()
    assert os.environ.get("OMP_WAIT_POLICY") in (None, "ACTIVE") and capsys.readouterr().err == ""


def test_it_comes_before_pytorch(tmp_path):
    """Whose OpenMP library reads the setting when it is loaded."""
    code = (
        "import sys, cocomix.core.threads as threads\n"
        "threads.wait_passively_on_busy_cores = lambda: print('torch' in sys.modules)\n"
        "import cocomix.cli as cli\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    (tmp_path / "config.yaml").write_text(f"out: {tmp_path}\ndata: {{folder: {tmp_path}/none}}\n")
    for command in ("train", "labels", "sae"):
        program = [sys.executable, "-c", code, command, "config.yaml"]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.stdout == "False\n" and done.returncode == 2, done.stderr
