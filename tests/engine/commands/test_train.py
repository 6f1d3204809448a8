import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from command_helpers import assert_refused, call, one_line, record_call
from run_helpers import environment

from cocomix.costs.memory_check import memory_warning
from cocomix.distributed.checkpoint import latest_checkpoint


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("source", [None, "runs/full"])
@pytest.mark.parametrize("code", [0, 75])
def test_it_trains_by_the_config_and_hands_on_the_exit_code(world, monkeypatch, resume, source, code):
    calls = record_call(monkeypatch, "cocomix.training.trainer.train", result=code)
    options = [*["--resume"] * resume, *(["--branch-from", source] if source else [])]
    assert call(world, "train", "train.lr=0.5", *options) == code
    assert calls == [(world.load("train.lr=0.5"), resume, source and Path(source), memory_warning)]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.learning_rate=1"], "unknown key train.learning_rate"),
        (["trian.lr=1"], "did you mean train?"),
        (["train.lr=fast"], "train.lr"),
        (["train=3"], "train is a section"),
        (["model.insert_layer=3"], "model.insert_layer (3) must be at least 0 and below model.n_layer (3)"),
        (["model.concept_topk=65"], "model.concept_topk (65) must be "),
        (["train.precision=bf16", "train.zero_stage=0"], "train.precision=bf16 needs train.zero_stage 1, 2 or 3"),
        (["train.zero_stage=4"], "train.zero_stage is 4; it must be 0, 1, 2 or 3"),
        (["deepspeed.gradient_clipping=1"], "deepspeed.gradient_clipping is filled in from train.grad_clip"),
        (["data.folder=OUT/nowhere"], "is missing"),
        (["data.seq_len=100000"], "fewer than one window"),
        (["teacher.sae=OUT/sae-wide"], "it was trained on another model"),
        (["teacher.sae=OUT/nothing"], "no SAE at"),
        (["teacher.layer=2"], "the teacher has blocks 0 to 1"),
        (["concept_labels.cache=OUT/nowhere"], "the label cache"),
        (["train.run=OUT/config.yaml", "model.mixing=none"], "config.yaml, which is a file: name a folder"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing_behind(world, capsys, overrides, message):
    assert_refused(world, capsys, "train", overrides, message)


class Dangerous:
    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_an_sae_file_that_needs_unpickling_is_refused(world, tmp_path, capsys):
    dangerous = Dangerous()
    dangerous.folder = str(tmp_path / "executed")
    torch.save({"encoder.weight": dangerous}, tmp_path / "sae.pt")
    assert call(world, "train", f"teacher.sae={tmp_path}/sae.pt", f"train.run={tmp_path}/run") == 2
    assert f"{tmp_path}/sae.pt" in one_line(capsys, "train")
    assert not (tmp_path / "executed").exists() and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2])
def test_a_terminal_that_closes_and_a_schedulers_warning_save_the_run(world, number):
    run = f"signal-{number}"
    settings = ["model.mixing=none", "train.tokens=40000"]
    code, output = world.interrupt(world.command(run, *settings), run, 3, number, threads=1)
    assert code == 75 and "interrupted: saved step" in output, output
    assert latest_checkpoint(world.folder / run) is not None


@pytest.mark.slow
def test_a_training_whose_reader_has_gone_ends_well(world):
    command = world.command("unread", "model.mixing=none", "train.tokens=2000")
    with open("/dev/full", "w") as full:
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command, env=environment(threads=1), stdout=writing, stderr=full, timeout=300)
        os.close(writing)
    assert done.returncode == 0 and (world.folder / "unread/model/config.json").exists()
