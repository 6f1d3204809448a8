"""One writer a folder, whatever becomes of it."""

import errno
import fcntl
import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest

from cocomix.core import locks
from cocomix.core.errors import CocomixError
from cocomix.core.locks import only_writer

HOLD = """
import sys, time
from cocomix.core.locks import only_writer
with only_writer(sys.argv[1], "cocomix train"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(folder) -> subprocess.Popen:
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(params=["locks", "leases"])
def kind(request, monkeypatch):
    """With the system's file locks, and where there are none."""
    if request.param == "leases":

        def refuse(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(locks.fcntl, "flock", refuse)
    return request.param


def test_a_second_writer_is_told_who_holds_the_folder_and_since_when(tmp_path, kind):
    folder = tmp_path / "deep" / "run"
    with only_writer(folder, "cocomix train"):
        with pytest.raises(CocomixError) as error, only_writer(folder, "cocomix sae"):
            pass
        expected = rf"{folder} is being written by cocomix train \(process {os.getpid()} on \S+, since 20\d\d-"
        assert re.match(expected, str(error.value)) and "\n" not in str(error.value)
        assert not folder.exists()  # a lock makes no folder
        with only_writer(tmp_path / "deep" / "other", "cocomix train"):
            pass
    assert list(tmp_path.iterdir()) == []
    with only_writer(folder, "cocomix train"):
        folder.mkdir()
    assert list(folder.parent.iterdir()) == [folder]


def test_a_folder_by_another_name_is_the_same_folder(tmp_path, kind):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    with only_writer(tmp_path / "run", "a"), pytest.raises(CocomixError, match="written by a "):
        with only_writer(tmp_path / "link", "b"):
            pass


def test_an_error_inside_is_passed_on_and_frees_the_folder(tmp_path, kind):
    with pytest.raises(ZeroDivisionError), only_writer(tmp_path / "run", "a"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_ends_with_its_process_also_where_that_is_killed(tmp_path):
    process = holder(tmp_path / "run")
    with pytest.raises(CocomixError, match=f"process {process.pid} on"), only_writer(tmp_path / "run", "a"):
        pass
    process.kill()
    process.wait()
    with only_writer(tmp_path / "run", "a"):
        assert json.loads((tmp_path / ".run.lock").read_text())["process"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_who_waits_comes_after_the_other(tmp_path, kind):
    order = []

    def other():
        with only_writer(tmp_path / "run", "b", wait_s=30):
            order.append("b")

    with only_writer(tmp_path / "run", "a"):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
        order.append("a")
    thread.join()
    assert order == ["a", "b"]


def test_of_many_one_at_a_time_is_inside(tmp_path, kind):
    inside, most = [0], [0]

    def work():
        for _ in range(5):
            with only_writer(tmp_path / "run", "a", wait_s=60):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                inside[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and list(tmp_path.iterdir()) == []


def test_a_lease_ends_some_time_after_its_last_sign_of_life(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(locks.fcntl, "flock", refuse)
    path = tmp_path / ".run.lock"
    path.write_text(json.dumps({"command": "x", "process": 1, "host": "elsewhere", "since": 0}))
    with pytest.raises(CocomixError, match=r"x \(process 1 on elsewhere"), only_writer(tmp_path / "run", "a"):
        pass
    long_ago = time.time() - locks.LEASE_S - 5
    os.utime(path, (long_ago, long_ago))
    monkeypatch.setattr(locks, "_TOUCH_S", 0.05)
    with only_writer(tmp_path / "run", "a"):
        os.utime(path, (long_ago, long_ago))
        deadline = time.monotonic() + 30
        while path.stat().st_mtime < long_ago + 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_says_nothing_still_holds(tmp_path):
    with open(tmp_path / ".run.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(CocomixError, match="being written by another process"), only_writer(tmp_path / "run", "a"):
            pass


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CocomixError, match="file/run cannot be written: "), only_writer(tmp_path / "file/run", "a"):
        pass


def test_what_goes_wrong_inside_is_not_taken_for_the_locks(tmp_path):
    with pytest.raises(FileNotFoundError), only_writer(tmp_path / "run", "a"):
        open(tmp_path / "nothing")
