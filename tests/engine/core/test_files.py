import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from cocomix.core import files
from cocomix.core.errors import CocomixError
from cocomix.core.files import (
    atomic_folder,
    atomic_path,
    atomic_write,
    explain_full_disk,
    final_name,
    read_json,
    require_space,
    sha256_of_file,
    sweep_leftovers,
    write_json,
)


def failing(number):
    """A function that raises the OSError of this number, as the system would."""

    def fail(*_args, **_options):
        raise OSError(number, os.strerror(number))

    return fail


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- files


@pytest.mark.parametrize("mode, content", [("wb", b"\x00\xff"), ("w", "señor 狐\n")])
def test_a_file_appears_when_the_block_ends(tmp_path, mode, content):
    path = tmp_path / "new" / "deep" / "file"
    with atomic_write(path, mode) as file:
        file.write(content)
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == (content if mode == "wb" else content.encode())
    assert files_in(tmp_path) == ["new/deep/file"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, CocomixError])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(failure):
        with atomic_write(path, "w") as file:
            file.write("new")
            raise failure
    assert path.read_text() == "old"
    assert files_in(tmp_path) == ["file"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("where", ["fsync", "write"])
def test_a_full_disk_is_explained_and_leaves_nothing(tmp_path, monkeypatch, number, where):
    monkeypatch.setattr("os.fsync", failing(number) if where == "fsync" else os.fsync)
    with pytest.raises(CocomixError, match=f"no room on disk while writing {tmp_path / 'file'}"):
        with atomic_write(tmp_path / "file") as file:
            file.write(b"content")
            if where == "write":
                failing(number)()
    assert files_in(tmp_path) == []


def test_a_disk_that_is_full_when_the_file_closes_is_explained_too(tmp_path, monkeypatch):
    class FullAtTheEnd(io.BytesIO):
        def close(self):
            super().close()
            failing(errno.ENOSPC)()

    monkeypatch.setattr("cocomix.core.files.open", lambda *_args, **_options: FullAtTheEnd(), raising=False)
    for failure in (None, OSError(errno.ENOSPC, "full")):
        with pytest.raises(CocomixError, match="no room on disk"):
            with atomic_write(tmp_path / "file") as file:
                file.fileno = lambda: 1
                monkeypatch.setattr("os.fsync", lambda _descriptor: None)
                if failure:
                    raise failure


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("function", ["cocomix.core.files.open", "os.replace", "os.mkdir"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, monkeypatch, number, function):
    path = tmp_path / "new" / "file"
    with monkeypatch.context() as patch:
        patch.setattr(function, failing(number), raising=False)
        with pytest.raises(CocomixError, match=f"{path} cannot be written: {os.strerror(number)}"):
            with atomic_write(path) as file:
                file.write(b"content")
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("write", [atomic_write, atomic_folder])
def test_a_file_in_the_place_of_a_parent_folder_is_named(tmp_path, write):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CocomixError, match=f"{tmp_path / 'file' / 'below'} cannot be written: "):
        with write(tmp_path / "file" / "below"):
            pass
    assert files_in(tmp_path) == ["file"]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path):
    (tmp_path / "name").mkdir()
    with pytest.raises(CocomixError, match=f"{tmp_path / 'name'} cannot be written: {os.strerror(errno.EISDIR)}"):
        with atomic_write(tmp_path / "name") as file:
            file.write(b"content")
    assert files_in(tmp_path) == []


def test_errors_of_the_block_itself_pass_through(tmp_path):
    for write in (atomic_write, atomic_folder):
        with pytest.raises(FileNotFoundError):
            with write(tmp_path / "out"):
                open(tmp_path / "no such input")
    with pytest.raises(PermissionError):
        with explain_full_disk(tmp_path):
            failing(errno.EACCES)()
    assert files_in(tmp_path) == []


def test_writers_of_the_same_file_do_not_disturb_each_other(tmp_path):
    together = threading.Barrier(4)

    def write(number):
        with atomic_write(tmp_path / "file", "w") as file:
            together.wait(timeout=10)
            file.write(str(number))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert (tmp_path / "file").read_text() in list("0123")
    assert files_in(tmp_path) == ["file"]


# --- folders


def fill(folder, content):
    (folder / "sub").mkdir()
    (folder / "a").write_text(content)
    (folder / "sub" / "b").write_text(content)


def test_a_folder_appears_when_the_block_ends(tmp_path):
    with atomic_folder(tmp_path / "deep" / "out") as aside:
        fill(aside, "new")
        assert not (tmp_path / "deep" / "out").exists()
    assert files_in(tmp_path) == ["deep/out/a", "deep/out/sub/b"]


def test_a_new_folder_takes_the_place_of_the_old_one_entirely(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "only in the old one").write_text("old")
    with atomic_folder(tmp_path / "out") as aside:
        fill(aside, "new")
    assert files_in(tmp_path) == ["out/a", "out/sub/b"]
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError(errno.ENOSPC, "full")])
def test_an_exception_leaves_the_old_folder_and_nothing_else(tmp_path, failure):
    with atomic_folder(tmp_path / "out") as aside:
        fill(aside, "old")
    with pytest.raises(CocomixError if isinstance(failure, OSError) else failure):
        with atomic_folder(tmp_path / "out") as aside:
            fill(aside, "new")
            raise failure
    assert (tmp_path / "out" / "sub" / "b").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_everything_is_on_disk_before_the_folder_appears(tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recording_fsync(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "out").exists()))
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", recording_fsync)
    with atomic_folder(tmp_path / "out") as aside:
        fill(aside, "new")
    before = [os.path.relpath(path, aside) for path, appeared in synced if not appeared]
    assert sorted(before) == [".", "a", "sub", "sub/b"]
    assert (str(tmp_path), True) in synced


def test_a_full_disk_while_syncing_leaves_the_old_folder(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "out") as aside:
        fill(aside, "old")
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", failing(errno.ENOSPC))
        with pytest.raises(CocomixError, match="no room on disk"):
            with atomic_folder(tmp_path / "out") as aside:
                fill(aside, "new")
    assert (tmp_path / "out" / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


def contents(tmp_path):
    """What the files `a` below hold, in visible and hidden folders."""
    return sorted(path.read_text() for path in tmp_path.glob("*/a"))


def test_no_crash_loses_the_old_folder_before_the_new_one_is_there(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "out") as aside:
        fill(aside, "old")
    calls, seen = ("os.replace", "os.rename", "shutil.rmtree", "os.unlink", "os.rmdir"), []

    def watched(function):
        def call(*args, **options):
            seen.append(contents(tmp_path))
            return function(*args, **options)

        return call

    with monkeypatch.context() as patch:
        for name in calls:
            module, function = name.split(".")
            patch.setattr(name, watched(getattr(__import__(module), function)))
        with atomic_folder(tmp_path / "out") as aside:
            fill(aside, "new")
    in_place = [state for state in seen if state]
    assert in_place[-1].count("new") == 1
    assert all("old" in state or "new" in state for state in in_place)
    assert any(state == ["new", "old"] for state in in_place)
    assert contents(tmp_path) == ["new"]


def test_a_failed_exchange_brings_the_old_folder_back(tmp_path, monkeypatch):
    with atomic_folder(tmp_path / "out") as aside:
        fill(aside, "old")
    replace = os.replace

    def fail_for_the_new_one(source, target):
        if str(source).endswith(".part"):
            failing(errno.EIO)()
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", fail_for_the_new_one)
        with pytest.raises(CocomixError, match=f"{tmp_path / 'out'} cannot be written: {os.strerror(errno.EIO)}"):
            with atomic_folder(tmp_path / "out") as aside:
                fill(aside, "new")
    assert contents(tmp_path) == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_crash_left_aside_is_swept_up_by_the_next_writer(tmp_path):
    (tmp_path / ".out.cocomix-old").mkdir()
    (tmp_path / ".out.cocomix-old" / "a").write_text("older")
    for content in ("new", "newest"):
        with atomic_folder(tmp_path / "out") as aside:
            fill(aside, content)
        assert os.listdir(tmp_path) == ["out"]
        assert contents(tmp_path) == [content]


def test_a_file_in_the_place_of_a_folder_is_named_and_kept(tmp_path):
    (tmp_path / "out").write_text("a file of the user's")
    with pytest.raises(CocomixError, match=f"{tmp_path / 'out'} cannot be written: {os.strerror(errno.ENOTDIR)}"):
        with atomic_folder(tmp_path / "out"):
            pass
    assert (tmp_path / "out").read_text() == "a file of the user's"
    assert os.listdir(tmp_path) == ["out"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch", target_is_directory=True)
    with atomic_folder(tmp_path / "out") as aside:
        fill(aside, "new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "scratch" / "a").read_text() == "new"


# --- room, JSON, checksums


def test_too_little_room_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 10 * 2**20})
    monkeypatch.setattr("shutil.disk_usage", lambda _folder: usage)
    require_space(tmp_path / "not" / "there" / "yet", 10 * 2**20)
    with pytest.raises(CocomixError, match=r"it needs 11 MiB and .* has 10 MiB free"):
        require_space(tmp_path / "not" / "there" / "yet", 11 * 2**20)
    assert os.listdir(tmp_path) == []


def test_json_comes_back_as_it_was_written(tmp_path):
    value = {"a": [1, 2.5, None], "b": {"c": "señor"}}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json", "the value") == value
    assert (tmp_path / "x.json").read_text().endswith("}\n")


def test_json_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": {1, 2}})
    assert read_json(tmp_path / "x.json", "the value") == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "the thing is missing: there is no"),
        (b'{"cut": ', "the thing cannot be read"),
        (b"\xff\xfe\x00", "the thing cannot be read"),
        (json.dumps([1]).encode(), "does not hold a JSON object"),
    ],
)
def test_missing_and_broken_json_is_named(tmp_path, content, message):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CocomixError, match=message) as raised:
        read_json(path, "the thing")
    assert str(path) in str(raised.value)


def test_a_folder_in_the_place_of_json_is_named(tmp_path):
    with pytest.raises(CocomixError, match=f"the thing cannot be read: {tmp_path}"):
        read_json(tmp_path, "the thing")


def test_a_files_checksum_is_that_of_its_bytes(tmp_path):
    content = os.urandom(100_000)
    (tmp_path / "x").write_bytes(content)
    assert sha256_of_file(tmp_path / "x") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("links", [True, False])
def test_a_json_file_is_created_once(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(files.os, "link", refuse)
    path = tmp_path / "deep/meta.json"
    assert files.create_json(path, {"a": 1}) is True
    assert files.create_json(path, {"a": 2}) is False
    assert files.read_json(path, "it") == {"a": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    """Those of safetensors too, which makes its own with another one; also deep inside a folder."""
    script = """
import sys, pathlib, torch
from safetensors.torch import save_file
from cocomix.core.files import atomic_folder, atomic_path, write_json
out = pathlib.Path(sys.argv[1])
with atomic_path(out / "a.safetensors") as aside:
    save_file({"x": torch.zeros(2)}, aside)
with atomic_folder(out / "folder") as aside:
    (aside / "deep").mkdir()
    save_file({"x": torch.zeros(2)}, aside / "deep" / "b.safetensors")
write_json(out / "c.json", {})
"""
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    subprocess.run(command, preexec_fn=lambda: os.umask(umask), check=True, timeout=120)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(("a.safetensors", "b.safetensors", "c.json"), 0o666 & ~umask)


def test_json_that_is_nested_without_end_is_refused(tmp_path):
    (tmp_path / "deep.json").write_text("[" * 200_000)
    with pytest.raises(CocomixError, match="it cannot be read: .*deep.json"):
        read_json(tmp_path / "deep.json", "it")


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    living = f".model.0a1b2c3d.{os.getpid()}.part"
    for name in (f".model.00ff00ff.{dead.pid}.part", f".other.00ff00ff.{dead.pid}.part", living, ".model.x.y.part"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / "model").mkdir()
    sweep_leftovers(tmp_path, "model")
    kept = {".model.x.y.part", living, "model"}
    assert {path.name for path in tmp_path.iterdir()} == kept | {f".other.00ff00ff.{dead.pid}.part"}
    sweep_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept
    sweep_leftovers(tmp_path, of_this_process=True)
    assert {path.name for path in tmp_path.iterdir()} == kept - {living}
    sweep_leftovers(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("needed", "free", "said"),
    [
        (3000, 12, "it needs 3,000 bytes and .* has 12 bytes free"),
        (2**20 + 1, 2**20, "it needs 1,048,577 bytes and .* has 1,048,576 bytes free"),
        (64 * 2**20, 100 * 2**10, "it needs 64 MiB and .* has 100 KiB free"),
    ],
)
def test_the_room_that_is_missing_is_said_in_a_unit_that_shows_it(tmp_path, monkeypatch, needed, free, said):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(CocomixError, match=said):
        require_space(tmp_path / "file", needed)


def test_what_is_written_aside_is_known_by_its_final_name(tmp_path):
    with atomic_path(tmp_path / "a.json") as aside:
        assert final_name(str(aside)) == str(tmp_path / "a.json") and final_name(aside.name) == "a.json"
        aside.write_text("{}")
    assert final_name("runs/.model.0123abcd.77.part/weights") == "runs/model/weights"
    for name in ("a.part", ".hidden", "x/.a.part/b", "y.model.0123abcd.77.part"):
        assert final_name(name) == name


def test_an_old_folder_that_was_being_replaced_comes_back_or_goes(tmp_path):
    for name in ("cut-off", "replaced"):
        (tmp_path / f".{name}.cocomix-old").mkdir()
        (tmp_path / f".{name}.cocomix-old" / "file").write_text("old")
    (tmp_path / "replaced").mkdir()
    (tmp_path / "replaced" / "file").write_text("new")
    sweep_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut-off", "replaced"]
    assert [(tmp_path / name / "file").read_text() for name in ("cut-off", "replaced")] == ["old", "new"]
