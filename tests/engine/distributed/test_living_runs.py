"""Readers of a run that trains, saves, and deletes the checkpoint that they are just reading."""

import shutil
from pathlib import Path

import pytest
import torch
from run_helpers import World
from safetensors.torch import load_file

from cocomix.cli import main
from cocomix.core.errors import CocomixError
from cocomix.distributed import checkpoint as checkpoints
from cocomix.distributed import export as exports
from cocomix.distributed.checkpoint import latest_checkpoint
from cocomix.distributed.export import export, find_model, load_model, read_model

OLDER, NEWER = "step-00000004", "step-00000008"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    assert world.train("whole", "model.mixing=none", "train.keep_checkpoints=3") == 0
    return world


class LivingRun:
    """A copy of the run `whole` as it was when it had saved `OLDER`; it goes on when it is told."""

    def __init__(self, whole: Path, folder: Path):
        shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("step-*12"))
        shutil.rmtree(folder / "model")
        self.folder, self._next = folder, folder / "next"
        self.checkpoint(NEWER).rename(self._next)

    def checkpoint(self, name: str) -> Path:
        return self.folder / "checkpoints" / name

    def save(self) -> None:
        """What a run does that keeps one checkpoint: a newer one is complete, and the older one is deleted."""
        if self._next.exists():
            self._next.rename(self.checkpoint(NEWER))
            shutil.rmtree(self.checkpoint(OLDER))


@pytest.fixture
def run(world, tmp_path):
    return LivingRun(world.folder / "whole", world.folder / tmp_path.name)


# Where the run goes on while something reads it: before this function of `export.py` is called for the first time.
MOMENTS = ["is_checkpoint", "read_trainer_state", "read_weights", "_expected_shapes", "_copy_description"]


def saves_before(monkeypatch, run, name: str, module=exports) -> None:
    function = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments, **more: (run.save(), function(*arguments, **more))[1])


def assert_is_newer(world, weights):
    expected = load_model(world.folder / "whole/checkpoints" / NEWER).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_checkpoint_that_goes_while_it_is_read_gives_way_to_the_next(world, run, tmp_path, monkeypatch, moment):
    found = find_model
    monkeypatch.setattr(exports, "find_model", lambda path: (found(path), saves_before(monkeypatch, run, moment))[0])
    out = export(run.folder, tmp_path / "out")
    assert run.checkpoint(NEWER).exists()
    assert_is_newer(world, load_file(out / "model.safetensors"))
    assert (out / "tokenizer.json").is_file() and (out / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("command", ["eval", "generate", "load_model"])
@pytest.mark.parametrize("moment", ["is_checkpoint", "read_weights"])
def test_every_reader_looks_again(world, run, monkeypatch, capsys, command, moment):
    found = find_model
    monkeypatch.setattr(exports, "find_model", lambda path: (found(path), saves_before(monkeypatch, run, moment))[0])
    if command == "load_model":
        assert_is_newer(world, load_model(run.folder).state_dict())
        return
    more = ["--prompt", "the cat", "--max-new-tokens", "2"] if command == "generate" else ["--windows", "4"]
    assert main([command, str(run.folder), *more]) == 0
    said = capsys.readouterr()
    monkeypatch.undo()
    assert main([command, str(world.folder / "whole/checkpoints" / NEWER), *more]) == 0
    assert said.out.splitlines()[-1].split(":")[-1] == capsys.readouterr().out.splitlines()[-1].split(":")[-1]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_checkpoint_that_was_named_does_not_give_way(run, tmp_path, monkeypatch, moment):
    named = run.checkpoint(OLDER)
    saves_before(monkeypatch, run, moment)
    with pytest.raises(CocomixError, match=r"holds no checkpoint: its run has deleted it.*train\.keep_checkpoints"):
        export(named, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(CocomixError, match=r"name the run, .*, for its latest one"):
        load_model(named)


def test_one_that_is_half_deleted_is_not_taken_for_a_transformers_folder(run):
    (run.checkpoint(OLDER) / "trainer.json").unlink()
    with pytest.raises(CocomixError, match="its run has deleted it"):
        find_model(run.checkpoint(OLDER))
    with pytest.raises(CocomixError, match="holds no model"):
        find_model(run.folder)


def test_what_is_wrong_with_a_checkpoint_that_stays_is_said_at_once(run):
    tried = []

    def read(folder):
        tried.append(folder)
        raise CocomixError("it is damaged")

    with pytest.raises(CocomixError, match="it is damaged"):
        read_model(run.folder, read)
    assert tried == [run.checkpoint(OLDER)]


def test_a_run_that_deletes_all_that_is_read_is_named(run):
    def read(folder):
        (folder / "trainer.json").unlink()
        newer = folder.with_name(f"step-{int(folder.name.removeprefix('step-')) + 1:08d}")
        folder.rename(newer)
        (newer / "trainer.json").write_text('{"world_size": 1}')
        raise FileNotFoundError

    with pytest.raises(CocomixError, match="deletes its checkpoints faster than they can be read"):
        read_model(run.folder, read)


def test_the_latest_checkpoint_is_found_while_it_changes(run, monkeypatch):
    """The run goes on between the listing and the look at each, and after each look."""
    latest = latest_checkpoint(run.folder)
    assert latest is not None and latest.name == OLDER
    looked = checkpoints._is_complete
    monkeypatch.setattr(checkpoints, "_is_complete", lambda folder: (run.save(), looked(folder))[1])
    latest = latest_checkpoint(run.folder)
    assert latest is not None and latest.name == NEWER


def test_a_checkpoint_whose_description_goes_while_it_is_looked_at_is_none(run, monkeypatch):
    saves_before(monkeypatch, run, "_trainer_json", module=checkpoints)
    latest = latest_checkpoint(run.folder)
    assert latest is not None and latest.name == NEWER
