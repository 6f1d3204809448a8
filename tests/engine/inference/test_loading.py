import shutil
from pathlib import Path

import pytest
import torch
from run_helpers import World

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.inference.loading import load_teacher, load_usable
from cocomix.model.pretrained import fingerprint


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tree with a run that was trained in it, by relative paths."""
    world = World(tmp_path_factory.mktemp("world"))
    world.add_teacher()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world.folder)
        relative = ["data.folder=data", "teacher.model=teacher", "teacher.sae=sae", "train.run=runs/run"]
        assert main(["train", "config.yaml", *relative, "train.tokens=256"]) == 0
    return world.folder


@pytest.fixture
def tree(trained, tmp_path, monkeypatch):
    """A copy of it, from another working directory in which something else is called `teacher`."""
    shutil.copytree(trained, tmp_path / "tree")
    monkeypatch.chdir(tmp_path)
    Path("teacher").mkdir()
    return tmp_path / "tree"


def load(run):
    return load_teacher(run, None, load_usable(run))


def test_the_teacher_of_a_moved_run_is_that_of_its_tree(tree, trained, capsys):
    found = load(tree / "runs/run")
    assert fingerprint(found.model) == fingerprint(load(trained / "runs/run").model)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        f"note: teacher.{key} of {tree}/runs/run was {trained}/{name}; taken from {tree}/{name}"
        for key, name in (("model", "teacher"), ("sae", "sae"))
    ]


@pytest.mark.parametrize("replaced", ["teacher", "sae"])
def test_another_teacher_or_sae_in_its_place_is_refused(tree, replaced):
    world = World(tree.parent / "other")
    world.add_teacher(seed=1)
    shutil.rmtree(tree / replaced)
    shutil.copytree(world.folder / replaced, tree / replaced)
    key = {"teacher": "teacher.model", "sae": "teacher.sae"}[replaced]
    with pytest.raises(CocomixError, match=f"was trained with another {key} than what is in its place now: name the"):
        load(tree / "runs/run")


def test_a_teacher_that_is_gone_is_named_with_where_it_was_looked_for(tree, trained, capsys, monkeypatch):
    shutil.rmtree(tree / "sae")
    moved = trained.rename(trained.with_name("renamed"))
    try:
        with pytest.raises(CocomixError) as raised:
            load(tree / "runs/run")
    finally:
        moved.rename(trained)
    places = f"{tree}/sae or {trained}/sae or {tree.parent}/sae"
    assert f"teacher.sae of {tree}/runs/run is gone: there is nothing at {places}; name the" in str(raised.value)
    monkeypatch.chdir(trained)
    torch.testing.assert_close(load("runs/run").sae.decoder, load(trained / "runs/run").sae.decoder)
