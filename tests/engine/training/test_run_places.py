import json
import os
import shutil
from pathlib import Path

import pytest
from run_helpers import World

from cocomix.core.config import Config, DataConfig, TrainConfig, load_config
from cocomix.core.errors import CocomixError
from cocomix.data.preparation import prepare
from cocomix.data.token_files import TokenFiles
from cocomix.training.run_places import DATA, SAE, TEACHER, find_data, find_part, fingerprints_of, places_of

REMEDY = "put it back"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with token files, `data`, and others, `other`."""
    folder = tmp_path_factory.mktemp("made")
    for name, overrides in (("data", []), ("other", ["data.val_fraction=0.3"])):
        world = World(folder / f"of-{name}")
        prepare(world.load(*overrides, f"data.folder={folder}/{name}").data)
    return folder


@pytest.fixture
def tree(tmp_path, made, monkeypatch):
    """A tree of a run and what it was trained with, all named relative to it, which is the working directory."""
    tree = tmp_path / "tree"
    shutil.copytree(made / "data", tree / "data")
    for folder in ("runs/run", "teacher", "sae"):
        (tree / folder).mkdir(parents=True)
    monkeypatch.chdir(tree)
    write_record(tree, {DATA: "data", TEACHER: "teacher", SAE: "sae"})
    return tree


def write_record(tree, named, **changes):
    """What training writes of the places of `named`."""
    overrides = [f"{key}={name}" for key, name in named.items()]
    (tree / "empty.yaml").write_text("")
    config = load_config(tree / "empty.yaml", ["train.run=runs/run", *overrides])
    record = {
        "config": {"data": {"folder": config.data.folder}, "teacher": vars(config.teacher)},
        "data": {"fingerprints": fingerprints_of(TokenFiles.open(tree / "data"))},
        "paths": {key: vars(place) for key, place in places_of(config).items()},
        **changes,
    }
    (tree / "runs/run/run.json").write_text(json.dumps(record))


def found(run):
    return find_data(run, "--data"), find_part(run, TEACHER, REMEDY), find_part(run, SAE, REMEDY)


def test_where_nothing_has_moved_paths_are_as_they_were_written(tree, capsys):
    assert found(tree / "runs/run") == ("data", "teacher", "sae")
    assert capsys.readouterr().err == ""


def test_another_working_directory_is_no_other_place_and_needs_no_note(tree, tmp_path, made, monkeypatch, capsys):
    shutil.copytree(made / "other", tmp_path / "elsewhere/data")
    (tmp_path / "elsewhere/teacher").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for run in (tree / "runs/run", os.path.relpath(tree / "runs/run")):
        assert found(Path(run)) == (str(tree / "data"), str(tree / "teacher"), str(tree / "sae"))
    assert capsys.readouterr().err == ""


def test_a_moved_tree_has_its_own_things_and_says_so(tree, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "far/away"
    shutil.copytree(tree, moved)
    monkeypatch.chdir(tmp_path)
    assert found(moved / "runs/run") == (str(moved / "data"), str(moved / "teacher"), str(moved / "sae"))
    shutil.rmtree(tree)
    assert found(moved / "runs/run") == (str(moved / "data"), str(moved / "teacher"), str(moved / "sae"))
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 3  # once each
    assert notes[0] == f"note: data.folder of {moved}/runs/run was {tree}/data; taken from {moved}/data"


def test_a_run_that_moved_alone_finds_what_stayed_and_not_what_is_called_the_same(tree, tmp_path, made, capsys):
    run = tmp_path / "new/runs/run"
    shutil.copytree(tree / "runs/run", run)
    shutil.copytree(made / "other", tmp_path / "new/data")
    assert found(run) == ("data", "teacher", "sae") and capsys.readouterr().err == ""
    (tmp_path / "link").symlink_to(tree / "runs/run")
    assert find_data(tmp_path / "link", "--data") == "data"


def test_other_data_in_its_place_are_refused(tree, made):
    shutil.rmtree(tree / "data")
    shutil.copytree(made / "other", tree / "data")
    with pytest.raises(CocomixError) as raised:
        find_data(tree / "runs/run", "--data")
    was, now = (TokenFiles.open(made / name).meta.splits["train"].sha256 for name in ("data", "other"))
    assert str(raised.value) == (
        f"{tree}/runs/run was trained on other token files: the SHA-256 of {tree}/data/train.bin is {now}, "
        f"that of the run's was {was}: name the run's with --data FOLDER"
    )


def test_what_is_gone_is_named_with_every_place_that_was_looked_at(tree, tmp_path, monkeypatch):
    for name in ("data", "teacher"):
        shutil.rmtree(tree / name)
    moved = tmp_path / "moved"
    tree.rename(moved)
    monkeypatch.chdir(tmp_path)
    looked_at = f"{moved}/NAME or {tree}/NAME or {tmp_path}/NAME"
    with pytest.raises(CocomixError) as raised:
        find_data(moved / "runs/run", "--data")
    assert str(raised.value).endswith(
        f"are gone: there are none in {looked_at.replace('NAME', 'data')}; name them with --data FOLDER"
    )
    with pytest.raises(CocomixError) as raised:
        find_part(moved / "runs/run", TEACHER, REMEDY)
    places = looked_at.replace("NAME", "teacher")
    assert str(raised.value) == f"teacher.model of {moved}/runs/run is gone: there is nothing at {places}; {REMEDY}"


def test_what_lies_on_the_hub_or_nowhere_is_named_as_it_was(tree):
    write_record(tree, {TEACHER: "hf:someone/model"})
    assert found(tree / "runs/run") == ("data", "hf:someone/model", None)


def test_what_a_run_of_an_earlier_version_says_is_taken_as_it_is(tree, tmp_path, made):
    write_record(tree, {DATA: "gone", TEACHER: "gone too"}, paths={}, data={"vocab_size": 300})
    assert found(tree / "runs/run") == ("gone", "gone too", None)
    (tree / "runs/run/run.json").write_text("{}")
    assert found(tree / "runs/run") == (None, None, None)


@pytest.mark.parametrize(
    "changes", [{"paths": [1]}, {"paths": {DATA: {"relative": 3}}}, {"data": {"fingerprints": [1]}}]
)
def test_a_record_with_places_that_are_none_is_refused(tree, changes):
    write_record(tree, {DATA: "data"}, **changes)
    with pytest.raises(CocomixError, match=r"run\.json: Expected|run\.json: Object missing"):
        find_data(tree / "runs/run", "--data")


def test_a_place_whose_name_is_not_utf_8_is_kept_from_the_run_alone(tmp_path, monkeypatch):
    there = tmp_path / os.fsdecode(b"caf\xe9")
    there.mkdir()
    monkeypatch.chdir(there)
    place = places_of(Config(train=TrainConfig(run="runs/it"), data=DataConfig(folder="data")))[DATA]
    assert (place.relative, place.absolute) == ("../../data", None)
