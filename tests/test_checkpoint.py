import errno
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from run_helpers import STEPS, World, assert_close_weights, assert_equal_runs
from safetensors import safe_open
from safetensors.torch import save_file

from cocomix.checkpoint import latest_checkpoint, model_folder, save_checkpoint
from cocomix.distributed import Ranks
from cocomix.errors import CocomixError
from cocomix.files import explain_full_disk
from cocomix.trainer import Trainer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.add_uneven_labels("labels")
    assert world.train("whole", *settings(world)) == 0
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 8)
        assert world.train("half", *settings(world)) == 75
    return world


def settings(world, *more):
    return [f"labels.cache={world.folder}/labels", "teacher.model=null", "teacher.sae=null", *more]


def stop_after(monkeypatch, step):
    """SIGTERM to this process in 1-based `step`."""
    train_step = Trainer._train_step

    def interrupted(self, batches):
        if self.step + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(self, batches)

    monkeypatch.setattr(Trainer, "_train_step", interrupted)


@pytest.fixture
def half(world, tmp_path):
    """A copy of a run that was interrupted at step 8; its name."""
    name = f"half-{tmp_path.name}"
    shutil.copytree(world.folder / "half", world.folder / name)
    return name


def steps(world, run):
    return sorted(int(folder.name.removeprefix("step-")) for folder in
                  (world.folder / run / "checkpoints").glob("step-*"))


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
    assert json.loads((world.folder / "whole/checkpoints/latest.json").read_text())["step"] == 12
    assert world.train("one", *settings(world), "train.keep_checkpoints=1") == 0
    assert steps(world, "one") == [12]


def test_a_run_without_checkpoints_has_no_latest_one(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_checkpoint_that_latest_does_not_name_is_never_used(world, half):
    folder = world.folder / half / "checkpoints"
    (folder / "step-00000010/state").mkdir(parents=True)  # killed in mid-write
    shutil.copytree(folder / "step-00000008", folder / "step-00000011")  # whole, but killed before it was named
    assert latest_checkpoint(folder.parent).name == "step-00000008"
    assert world.train(half, *settings(world), resume=True) == 0
    assert_equal_runs(world, "whole", half)


def test_leftovers_of_a_killed_save_do_not_push_out_complete_checkpoints(world, half, monkeypatch):
    folder = world.folder / half / "checkpoints"
    for step in (11, 12, 40):
        (folder / f"step-000000{step}/state").mkdir(parents=True)
    with monkeypatch.context() as patch:
        stop_after(patch, 10)
        assert world.train(half, *settings(world), "train.keep_checkpoints=1", resume=True) == 75
    assert steps(world, half) == [10]
    assert latest_checkpoint(folder.parent).name == "step-00000010"


def test_a_vanished_or_unreadable_latest_checkpoint_is_named(world, half, capsys):
    folder = world.folder / half / "checkpoints"
    (folder / "step-00000008/trainer.json").unlink()
    assert "names step-00000008, which is missing or incomplete" in refused(world, capsys, half)
    (folder / "latest.json").write_text('{"step": 8}')
    assert "names no checkpoint" in refused(world, capsys, half)
    (folder / "latest.json").write_text('{"step"')
    assert "cannot be read" in refused(world, capsys, half)


def test_model_folder_is_the_model_wherever_it_lies(world, tmp_path):
    whole, half = world.folder / "whole", world.folder / "half"
    for path in (whole, whole / "model", str(whole)):
        assert model_folder(path) == whole / "model"
    assert model_folder(half) == half / "checkpoints/step-00000008/model"
    assert model_folder(half / "checkpoints/step-00000004") == half / "checkpoints/step-00000004/model"
    with pytest.raises(CocomixError, match="holds no model"):
        model_folder(tmp_path)


def test_the_model_in_a_checkpoint_is_whole_for_transformers(world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder(world.folder / "half")
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size


# ---------------------------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(("override", "message"), [
    ("model.n_embd=16", "model.n_embd was 32 and is 16"),
    ("model.n_layer=4", "model.n_layer was 3 and is 4"),
    ("model.mixing=add", "model.mixing was interleave and is add"),
    ("train.global_batch=16", "train.global_batch was 8 and is 16"),
    ("train.seed=1", "train.seed was 0 and is 1"),
    ("train.weight_decay=0.2", "train.weight_decay was 0.1 and is 0.2"),
    ("train.precision=bf16", "train.precision was fp32 and is bf16"),
])
def test_a_checkpoint_of_another_run_is_refused_by_name(world, half, capsys, override, message):
    assert message in refused(world, capsys, half, override)


def test_other_text_and_other_labels_are_refused_by_name(world, half, capsys):
    file = world.folder / half / "checkpoints/step-00000008/trainer.json"
    state = json.loads(file.read_text())
    assert state["identity"]["the labels' layer"] == "1"
    state["identity"] |= {"the text's fingerprint": "feed", "the labels' layer": "2"}
    file.write_text(json.dumps(state))
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


@pytest.mark.parametrize(("damage", "message"), [
    (truncate, "rank-00000-of-00001.safetensors is damaged: "),
    (empty, "rank-00000-of-00001.safetensors is damaged: "),
    (os.unlink, "rank-00000-of-00001.safetensors is missing"),
    (take_from_another_save, "rank-00000-of-00001.safetensors belongs to another save"),
    (drop_a_piece, "lack parts of transformer.wte.weight"),
])
def test_damaged_files_of_the_training_state_are_named(world, half, capsys, damage, message):
    damage(world.folder / half / "checkpoints/step-00000008/state/rank-00000-of-00001.safetensors")
    error = refused(world, capsys, half)
    assert "step-00000008 cannot be loaded: " in error and message in error


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


@pytest.mark.parametrize(("target", "failure"), [
    ("safetensors.torch.save_file", no_space),
    ("safetensors.torch.serialize_file", writer_fails("I/O error: No space left on device (os error 28)")),
    ("transformers.PreTrainedTokenizerFast.save_pretrained", writer_fails("No space left on device (os error 28)")),
    ("cocomix.checkpoint.write_json", explained),
], ids=["file system", "safetensors", "tokenizer", "trainer.json"])
def test_a_full_disk_leaves_older_checkpoints_and_the_pointer_alone(world, half, capsys, monkeypatch, target, failure):
    run = world.folder / half
    before = (run / "checkpoints/latest.json").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(target, failure)
        assert world.train(half, *settings(world), resume=True) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "no room on disk while writing" in error
    assert steps(world, half) == [4, 8] and (run / "checkpoints/latest.json").read_bytes() == before
    assert world.train(half, *settings(world), resume=True) == 0
    assert_equal_runs(world, "whole", half)


def test_other_errors_of_a_writer_are_not_taken_for_a_full_disk(tmp_path):
    engine = SimpleNamespace(zero_optimization_stage=writer_fails("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        save_checkpoint(engine, tmp_path, 1, {}, Ranks(0, 1, torch.device("cpu")), 2, None)
    assert list(tmp_path.iterdir()) == []


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
    assert 20 <= json.loads((world.folder / run / "checkpoints/latest.json").read_text())["step"] < 128
    assert world.train(run, *more, resume=True) == 0
    assert_equal_runs(world, "long", run)


def test_steps_after_a_resume_differ_from_a_run_of_other_batches(world):
    """What `assert_equal_runs` compares does depend on the data's order."""
    assert world.train("other", *settings(world), "train.seed=1") == 0
    assert len(world.losses("other")) == STEPS and world.losses("other") != world.losses("whole")
    with pytest.raises(AssertionError):
        assert_close_weights(world.weights("other"), world.weights("whole"), atol=1e-4)
