import re
import shutil

import pytest
from command_helpers import assert_refused, call, one_line, record_call


def test_it_prepares_the_data_of_the_config(world, monkeypatch):
    calls = record_call(monkeypatch, "cocomix.data.preparation.prepare")
    assert call(world, "data", "data.seq_len=8") == 0
    [[data]] = calls
    assert data == world.load("data.seq_len=8").data


def test_finished_token_files_are_verified_and_not_made_anew(world, monkeypatch):
    prepared = record_call(monkeypatch, "cocomix.data.preparation.prepare")
    verified = []
    monkeypatch.setattr("cocomix.data.preparation.verify", verified.append)
    assert call(world, "data", "--verify", "data.seq_len=8") == 0
    assert verified == [world.load("data.seq_len=8").data] and not prepared


def test_a_changed_token_is_found_by_name(world, tmp_path, capsys):
    folder = tmp_path / "data"
    shutil.copytree(world.load().data.folder, folder)
    assert call(world, "data", "--verify", f"data.folder={folder}") == 0
    assert re.fullmatch(rf"{folder} is as it was made: [\d,]+ train and [\d,]+ val tokens\n", capsys.readouterr().out)
    content = bytearray((folder / "val.bin").read_bytes())
    content[6] ^= 1
    (folder / "val.bin").write_bytes(content)
    assert call(world, "data", "--verify", f"data.folder={folder}") == 2
    assert f"{folder}/val.bin has changed since it was made" in one_line(capsys, "data")
    assert call(world, "data", "--verify", f"data.folder={tmp_path}/none") == 2
    assert "`cocomix data` makes them" in one_line(capsys, "data")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.folder=OUT/new", "data.text=[OUT/nothing]"], "there is no file or folder"),
        (["data.folder=OUT/new", "data.text=[]"], "data.text names no text"),
        (["data.val_fraction=0.3"], "was made from something else"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(world, capsys, overrides, message):
    assert_refused(world, capsys, "data", overrides, message)


def test_a_text_without_text_is_refused(world, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "binary.bin").write_bytes(b"\0\1\2" * 100)
    assert call(world, "data", f"data.text=[{tmp_path}]", f"data.folder={tmp_path}/out") == 2
    assert "there is no text in it" in one_line(capsys, "data")
    assert not (tmp_path / "out").exists()
