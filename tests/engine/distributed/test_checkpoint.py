import errno
import json
import math
import shutil
import signal
import threading

import pytest
import safetensors.torch
import torch
from run_helpers import STEPS, World, assert_close_weights, assert_equal_runs, before_steps, stop_at
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stored_json import change_json

from cocomix.core.errors import CocomixError
from cocomix.core.files import explain_full_disk
from cocomix.distributed import background_write
from cocomix.distributed.checkpoint import latest_checkpoint
from cocomix.distributed.export import find_model, load_model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.add_uneven_labels("labels")
    assert world.train("whole", *settings(world)) == 0
    assert world.train("all", *settings(world), "train.keep_checkpoints=3") == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 8)
        assert world.train("half", *settings(world)) == 75
    return world


def settings(world, *more):
    return [f"concept_labels.cache={world.folder}/labels", "teacher.model=null", "teacher.sae=null", *more]


@pytest.fixture
def half(world, tmp_path):
    """A copy of a run that was interrupted at step 8; its name."""
    name = f"half-{tmp_path.name}"
    shutil.copytree(world.folder / "half", world.folder / name)
    return name


def steps(world, run):
    return sorted(
        int(folder.name.removeprefix("step-")) for folder in (world.folder / run / "checkpoints").glob("step-*")
    )


def refused(world, capsys, run, *overrides):
    """The error of a resumption that must be refused, after which the run can still go on."""
    before = (world.folder / run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert world.train(run, *settings(world), *overrides, resume=True) == 2
    error = capsys.readouterr().err
    assert error.startswith("cocomix train: error: ") and error.count("\n") == 1
    assert (world.folder / run / "metrics.jsonl").read_bytes() == before
    return error


# ---------------------------------------------------------------------------------------------- what is kept


def test_the_newest_checkpoints_are_kept(world):
    assert steps(world, "whole") == [8, 12]  # keep_checkpoints is 2
    assert latest_checkpoint(world.folder / "whole").name == "step-00000012"
    assert world.train("one", *settings(world), "train.keep_checkpoints=1") == 0
    assert steps(world, "one") == [12]


def test_a_run_without_checkpoints_has_no_latest_one(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("missing", ["trainer.json", "state/rank-00001-of-00002.safetensors", "state"])
def test_a_checkpoint_is_complete_with_its_description_and_the_files_of_all_ranks(tmp_path, missing):
    for step in (4, 8):
        state = tmp_path / f"checkpoints/step-0000000{step}/state"
        state.mkdir(parents=True)
        (state.parent / "trainer.json").write_text('{"world_size": 2}')
        for rank in range(2):
            (state / f"rank-0000{rank}-of-00002.safetensors").touch()
        (state / ".rank-00001-of-00002.safetensors.abc.1.part").touch()
    assert latest_checkpoint(tmp_path).name == "step-00000008"
    gone = tmp_path / "checkpoints/step-00000008" / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    assert latest_checkpoint(tmp_path).name == "step-00000004"


def test_a_half_written_checkpoint_is_never_used_and_cleared_away(world, half, monkeypatch):
    folder = world.folder / half / "checkpoints"
    for step in (9, 11, 12, 40):
        (folder / f"step-000000{step:02}/state").mkdir(parents=True)  # killed in mid-write
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        assert world.train(half, *settings(world), "train.keep_checkpoints=1", resume=True) == 75
    assert steps(world, half) == [10]
    assert world.train(half, *settings(world), resume=True) == 0
    assert_equal_runs(world, "whole", half)


def test_a_checkpoint_being_thinned_out_is_never_complete_without_its_model(world, half, monkeypatch):
    monkeypatch.setattr("cocomix.distributed.checkpoint.shutil.rmtree", lambda *_, **__: None)  # killed in mid-removal
    assert world.train(half, *settings(world), resume=True) == 0
    older = world.folder / half / "checkpoints/step-00000004"
    assert older.is_dir() and not (older / "trainer.json").exists()


def test_what_is_saved_is_the_state_at_that_step_and_not_a_later_one(world, tmp_path, monkeypatch):
    """The file is written while training goes on: here only after two more steps."""
    released = threading.Event()
    write = background_write._SafetensorsFile.write_data
    monkeypatch.setattr(
        background_write._SafetensorsFile,
        "write_data",
        lambda self, plan, planner: (released.wait(60), write(self, plan, planner))[1],
    )

    def work(train_step):
        if train_step.engine.global_steps == 6:
            assert latest_checkpoint(world.folder / run) is None
            released.set()

    before_steps(monkeypatch, work)
    run = f"late-{tmp_path.name}"
    assert world.train(run, *settings(world), "train.keep_checkpoints=3") == 0
    late, prompt = (
        load_file(world.folder / name / "checkpoints/step-00000004/state/rank-00000-of-00001.safetensors")
        for name in (run, "all")
    )
    assert late.keys() == prompt.keys()
    assert all(torch.equal(tensor, prompt[key]) for key, tensor in late.items())


def test_find_model_is_the_model_wherever_it_lies(world, tmp_path):
    whole, half = world.folder / "whole", world.folder / "half"
    for path in (whole, whole / "model", str(whole)):
        assert find_model(path) == whole / "model"
    assert find_model(half) == half / "checkpoints/step-00000008"
    assert find_model(half / "checkpoints/step-00000004") == half / "checkpoints/step-00000004"
    with pytest.raises(CocomixError, match="holds no model"):
        find_model(tmp_path)


def test_the_model_of_a_checkpoint_is_whole(world):
    from transformers import AutoTokenizer

    checkpoint = world.folder / "whole/checkpoints/step-00000012"
    model = load_model(checkpoint)
    assert model.lm_head.weight is model.transformer.wte.weight and not model.training
    state = model.state_dict()
    for name, tensor in world.weights("whole").items():
        assert torch.equal(state[name], tensor)
    assert len(AutoTokenizer.from_pretrained(checkpoint / "model")) == model.config.vocab_size


# ---------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.n_embd=16", "model.n_embd was 32 and is 16"),
        ("model.n_layer=4", "model.n_layer was 3 and is 4"),
        ("model.mixing=add", "model.mixing was interleave and is add"),
        ("train.global_batch=16", "train.global_batch was 8 and is 16"),
        ("train.seed=1", "train.seed was 0 and is 1"),
        ("train.weight_decay=0.2", "train.weight_decay was 0.1 and is 0.2"),
        ("train.precision=bf16", "train.precision was fp32 and is bf16"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(world, half, capsys, override, message):
    assert message in refused(world, capsys, half, override)


def test_other_text_and_other_labels_are_refused_by_name(world, half, capsys):
    file = world.folder / half / "checkpoints/step-00000008/trainer.json"
    state = json.loads(file.read_text())
    assert state["identity"]["the labels' layer"] == "1"
    other = {"the text's fingerprint": "feed", "the labels' layer": "2"}
    change_json(file, {"identity": state["identity"] | other})
    error = refused(world, capsys, half)
    assert "the text's fingerprint was feed and is " in error and "the labels' layer was 2 and is 1" in error


def test_a_checkpoint_of_another_version_is_refused(world, half, capsys):
    file = world.folder / half / "checkpoints/step-00000008/trainer.json"
    file.write_text(json.dumps({"step": 8, "world_size": 1}))
    assert "was written by another version of cocomix" in refused(world, capsys, half)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def take_from_another_save(file):
    shutil.copy(file.parents[2] / "step-00000004/state" / file.name, file)


def drop_a_piece(file):
    with safe_open(file, "pt") as stored:
        tensors, metadata = {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata()
    del tensors["transformer.wte.weight/exp_avg/0"]
    save_file(tensors, file, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "rank-00000-of-00001.safetensors is damaged: "),
        (empty, "rank-00000-of-00001.safetensors is damaged: "),
        (take_from_another_save, "rank-00000-of-00001.safetensors belongs to another save"),
        (drop_a_piece, "lack parts of transformer.wte.weight"),
    ],
)
def test_damaged_files_of_the_training_state_are_named(world, half, capsys, damage, message):
    damage(world.folder / half / "checkpoints/step-00000008/state/rank-00000-of-00001.safetensors")
    error = refused(world, capsys, half)
    assert "step-00000008 cannot be loaded: " in error and message in error and "Move it away" in error


def test_a_damaged_checkpoint_that_is_moved_away_gives_way_to_the_one_before(world, half):
    folder = world.folder / half / "checkpoints"
    truncate(folder / "step-00000008/state/rank-00000-of-00001.safetensors")
    shutil.move(folder / "step-00000008", folder / "damaged")
    assert world.train(half, *settings(world), resume=True) == 0
    assert_equal_runs(world, "whole", half)


def test_an_unreadable_description_is_named(world, half, capsys):
    (world.folder / half / "checkpoints/step-00000008/trainer.json").write_text('{"step"')
    assert "step-00000008/trainer.json" in refused(world, capsys, half)


# ---------------------------------------------------------------------------------------------- a full disk


def no_space(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def explained(path, _value):
    with explain_full_disk(path):
        no_space()


def writer_fails(text):
    def fail(*_args, **_kwargs):
        raise RuntimeError(text)  # as safetensors and tokenizers do

    return fail


FULL = {
    "file system": ("safetensors.torch.save_file", no_space),
    "safetensors": (
        "safetensors.torch.serialize_file",
        writer_fails("I/O error: No space left on device (os error 28)"),
    ),
    "tokenizer": (
        "transformers.PreTrainedTokenizerFast.save_pretrained",
        writer_fails("No space left on device (os error 28)"),
    ),
    "trainer.json": ("cocomix.distributed.checkpoint.write_own_json", explained),
}


@pytest.mark.parametrize("kind", FULL)
def test_a_full_disk_leaves_older_checkpoints_alone(world, half, capsys, monkeypatch, kind):
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(*FULL[kind])
        assert world.train(half, *settings(world), resume=True) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no room on disk while writing" in error
    assert steps(world, half) == [4, 8]
    assert world.train(half, *settings(world), resume=True) == 0
    assert_equal_runs(world, "whole", half)


def test_a_run_goes_on_after_a_failed_save_if_told_so(world, capsys, monkeypatch):
    save_file, calls = safetensors.torch.save_file, []

    def fails_once(tensors, path, **more):
        calls.append(path)
        return no_space() if len(calls) == 2 else save_file(tensors, path, **more)

    monkeypatch.setattr("safetensors.torch.save_file", fails_once)
    assert world.train("told", *settings(world), "train.continue_after_failed_save=true") == 0
    error = capsys.readouterr().err
    assert "a save failed; training continues without it: no room on disk" in error and "step-00000008" in error
    assert steps(world, "told") == [4, 12]
    assert_equal_runs(world, "whole", "told")


def test_a_run_whose_last_save_failed_gives_no_model_of_an_older_one(world, capsys, monkeypatch):
    save_file, calls = safetensors.torch.save_file, []

    def third_fails(tensors, path, **more):
        calls.append(path)
        return no_space() if len(calls) == 3 else save_file(tensors, path, **more)

    told = "train.continue_after_failed_save=true"
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", third_fails)
        assert world.train("lost-end", *settings(world), told) == 2
    assert "the last checkpoint of " in capsys.readouterr().err
    assert steps(world, "lost-end") == [4, 8] and not (world.folder / "lost-end/model").exists()
    assert world.train("lost-end", *settings(world), told, resume=True) == 0
    assert_equal_runs(world, "whole", "lost-end")


def test_a_run_that_was_killed_at_its_end_evaluates_again_and_logs_it_once(world, monkeypatch):
    monkeypatch.setattr("cocomix.training.trainer.export_checkpoint", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.train("end", *settings(world))
    monkeypatch.undo()
    assert world.train("end", *settings(world), resume=True) == 0
    assert [record["step"] for record in world.records("end", "eval")] == [6, 12]
    assert_equal_runs(world, "whole", "end")


def test_other_errors_of_a_writer_are_said_and_not_taken_for_a_full_disk(world, capsys, monkeypatch):
    monkeypatch.setattr("safetensors.torch.save_file", writer_fails("something else"))
    assert world.train("failing", *settings(world)) == 2
    error = capsys.readouterr().err
    assert "step-00000004 could not be written: RuntimeError: something else" in error and "no room" not in error
    assert steps(world, "failing") == []


# ---------------------------------------------------------------------------------------------- real interruptions


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_that_was_really_interrupted_goes_on_bit_for_bit(world, number):
    more = settings(world, "train.tokens=16384", "train.save_every=10", "train.eval_every=25")  # 128 steps
    if not (world.folder / "long").exists():
        assert world.train("long", *more) == 0
    run = f"long-{number.name}"
    code, output = world.interrupt(world.command(run, *more), run, after_step=25, number=number)
    if number == signal.SIGKILL:
        assert code == -number
    else:
        assert code == 75 and "interrupted: saved step " in output and "Traceback" not in output
    latest = latest_checkpoint(world.folder / run)
    assert 20 <= json.loads((latest / "trainer.json").read_text())["step"] < 128
    assert world.train(run, *more, resume=True) == 0
    assert_equal_runs(world, "long", run)


def test_steps_after_a_resume_differ_from_a_run_of_other_batches(world):
    """What `assert_equal_runs` compares does depend on the data's order."""
    assert world.train("other", *settings(world), "train.seed=1") == 0
    assert len(world.losses("other")) == STEPS and world.losses("other") != world.losses("whole")
    with pytest.raises(AssertionError):
        assert_close_weights(world.weights("other"), world.weights("whole"), atol=1e-4)


@pytest.mark.parametrize(
    "value, noticed",
    [
        (math.inf, "step-00000008"),  # its weight stays where it is
        (math.nan, "step-00000012"),  # it makes steps that are skipped, and no saves meanwhile
    ],
)
def test_a_state_that_is_not_finite_is_not_saved_and_ends_the_run(world, capsys, monkeypatch, value, noticed):
    def spoil(train_step):
        if train_step.engine.global_steps == 6:
            moments = next(iter(train_step.engine.basic_optimizer.state.values()))["exp_avg_sq"]
            moments.view(-1)[0] = value

    name = f"not-finite-{value}"
    with monkeypatch.context() as patch:
        before_steps(patch, spoil)
        told = ["train.continue_after_failed_save=true", "train.max_skipped_steps=100"]
        assert world.train(name, *settings(world), *told) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert noticed in error and ("/exp_avg_sq/" in error or "/master/" in error)
    assert "holds numbers that are not finite" in error and "lower train.lr" in error
    assert steps(world, name) == [4]
    assert world.train(name, *settings(world), resume=True) == 0
    assert_equal_runs(world, "whole", name)
