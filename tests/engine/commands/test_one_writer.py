"""Commands that would write where another process writes are refused before they change anything."""

import contextlib
import subprocess
import sys

import pytest
from command_helpers import assert_refused, call
from run_helpers import environment

from cocomix.core.locks import only_writer
from cocomix.teacher.label_cache import LabelCache

CASES = {
    "data": (["data.folder=OUT/new-data"], "new-data"),
    "sae": (["teacher.sae=OUT/new-sae"], "new-sae"),
    "train": (["train.run=OUT/new-run", "model.mixing=none"], "new-run"),
}


@pytest.mark.parametrize("command", CASES)
def test_a_folder_that_another_process_writes_is_left_alone(world, capsys, command):
    arguments, name = CASES[command]
    with only_writer(world.folder / name, "cocomix something"):
        assert_refused(world, capsys, command, arguments, f"{name} is being written by cocomix something (process ")


def test_a_run_that_is_training_is_not_resumed_by_a_second_process(world, capsys):
    short = ["train.run=OUT/living", "model.mixing=none", "train.tokens=512"]
    assert call(world, "train", *short) == 0
    (world.folder / "living/model").rename(world.folder / "living/gone")  # or it would be finished
    with only_writer(world.folder / "living", "cocomix train"):
        assert_refused(world, capsys, "train", [*short, "--resume"], "living is being written by cocomix train (")
    assert call(world, "train", *short, "--resume") == 0


@pytest.mark.parametrize(
    ("command", "target", "folder", "settings", "message"),
    [
        ("data", "cocomix.data.preparation.only_writer", "late-data", ["data.folder=OUT/late-data"], None),
        ("data", "cocomix.data.preparation.only_writer", "late-data", ["data.folder=OUT/late-data"], "was made from"),
        ("sae", "cocomix.teacher.sae_training.only_writer", "late-sae", ["teacher.sae=OUT/late-sae"], None),
        ("sae", "cocomix.teacher.sae_training.only_writer", "late-sae", ["teacher.sae=OUT/late-sae"], "differs in"),
        (
            "train",
            "cocomix.training.trainer.only_writers",
            "late-run",
            ["train.run=OUT/late-run", "model.mixing=none", "train.tokens=512"],
            "already holds a run: pass --resume",
        ),
    ],
)
def test_what_another_process_finished_before_the_lock_was_held_counts(
    world, capsys, monkeypatch, tmp_path, command, target, folder, settings, message
):
    """It was not there when the command looked first."""
    different = {"data": "data.val_fraction=0.2", "sae": "sae.seed=5", "train": "train.seed=5"}[command]
    others = [*settings, different] if message else settings
    assert call(world, command, *others) == 0
    (world.folder / folder).rename(tmp_path / "theirs")

    @contextlib.contextmanager
    def after_the_other(*_, **__):
        (tmp_path / "theirs").rename(world.folder / folder)
        yield

    monkeypatch.setattr(target, after_the_other)
    capsys.readouterr()
    assert call(world, command, *settings) == (2 if message else 0)
    said = capsys.readouterr()
    if message:
        assert message in said.err
    else:
        assert "is up to date" in said.out or "already holds this SAE" in said.out
    (world.folder / folder).rename(tmp_path / "done")


@pytest.mark.slow
def test_of_two_trainings_that_start_together_one_trains(world):
    arguments = ["model.mixing=none", "train.tokens=40000"]
    commands = [world.command("both", *arguments, f"train.seed={seed}") for seed in (0, 1)]
    run = dict(env=environment(threads=1), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    processes = [subprocess.Popen(command, **run) for command in commands]
    done = [(process.communicate(timeout=300), process.returncode) for process in processes]
    codes = sorted(code for _, code in done)
    assert codes == [0, 2], done
    [error] = [errors for (_, errors), code in done if code == 2]
    [line] = [line for line in error.splitlines() if line.startswith("cocomix train: error")]
    assert "is being written by cocomix train" in line or "already holds a run" in line
    winner = next(seed for seed, (_, code) in enumerate(done) if code == 0)
    assert f'"seed": {winner}' in (world.folder / "both/run.json").read_text()


def test_a_cache_that_two_processes_begin_at_once_is_one_of_them(tmp_path):
    """The slower one finds the description of the faster, which must be its own."""
    made = dict(n_windows=8, seq_len=4, label_topk=2, shard_windows=4)
    script = (
        "import sys; from cocomix.teacher.label_cache import LabelCache\n"
        "LabelCache.create(sys.argv[1], n_windows=8, seq_len=4, label_topk=2, shard_windows=4,"
        " fingerprints={'data': 'x', 'layer': sys.argv[2]})"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "cache"), str(layer)], stderr=subprocess.PIPE)
        for layer in (1, 2)
    ]
    errors = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert sorted(process.returncode for process in processes) == [0, 1], errors
    layer = [process.returncode for process in processes].index(0) + 1
    assert "was made from another block of the teacher" in errors[2 - layer]
    kept = LabelCache.create(tmp_path / "cache", **made, fingerprints={"data": "x", "layer": str(layer)})
    assert kept.fingerprints["layer"] == str(layer)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["meta.json"]
