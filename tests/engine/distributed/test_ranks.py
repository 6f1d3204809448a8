import json
import os
import signal
import subprocess
import sys
from datetime import timedelta

import numpy as np
import pytest
import torch
from launch_helpers import free_port
from run_helpers import (
    SEQ_LEN,
    STEPS,
    TORCHRUN,
    assert_close_weights,
    assert_equal_runs,
    environment,
    uneven,
)

from cocomix.core.errors import CocomixError
from cocomix.distributed.ranks import Ranks, import_deepspeed, own_device, process_group, rank_and_world
from cocomix.teacher.label_cache import LabelCache

# ---------------------------------------------------------------------------------------------- one process


def test_a_single_rank_agrees_with_itself():
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert ranks.is_first and not Ranks(1, 2, torch.device("cpu")).is_first
    assert ranks.any(True) is True and ranks.any(False) is False
    torch.testing.assert_close(ranks.sum(torch.tensor([1.0, 2.0])), torch.tensor([1.0, 2.0]))
    assert ranks.from_first("mine") == "mine"
    ranks.barrier()


def test_rank_and_world_are_what_the_launcher_announces(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert rank_and_world() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert rank_and_world() == (3, 4)


def test_a_local_rank_without_a_gpu_is_a_user_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert own_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(CocomixError, match="local rank 2 has no GPU: this process sees 2"):
        own_device()


def test_the_process_group_comes_and_goes_and_leaves_the_environment_alone(monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")  # of something else
    before = dict(os.environ)
    for _ in range(2):
        with process_group(1) as ranks:
            assert (ranks.rank, ranks.world) == (0, 1) and torch.distributed.is_initialized()
        assert not torch.distributed.is_initialized()
    with pytest.raises(RuntimeError, match="mine"), process_group(1):
        raise RuntimeError("mine")
    assert not torch.distributed.is_initialized()
    changed = {name for name in before.keys() | os.environ.keys() if before.get(name) != os.environ.get(name)}
    assert not changed & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def test_a_group_of_the_caller_is_used_and_left_alone(world, tmp_path):
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(str(tmp_path / "store"), 1),
        rank=0,
        world_size=1,
        timeout=timedelta(minutes=1),
    )
    try:
        assert world.train("inside", *uneven(world)) == 0
        assert torch.distributed.is_initialized()
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        assert total == 1
    finally:
        import_deepspeed().comm.destroy_process_group()
    assert world.train("outside", *uneven(world)) == 0
    assert_equal_runs(world, "inside", "outside")


def test_deepspeed_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(CocomixError, match=r"pip install 'cocomix\[train\]'"):
        import_deepspeed()


# ---------------------------------------------------------------------------------------------- two processes


def assert_as_one_process(world, run, *overrides, atol=1e-5, weight_atol=1e-5, norm_rtol=1e-4):
    """A finished run on two processes has the losses and the weights of one process at the same global batch."""
    alone = f"{run}-alone"
    assert world.train(alone, *overrides) == 0
    assert json.loads((world.folder / run / "run.json").read_text())["world_size"] == 2
    for key in ("loss", "ntp_loss", "concept_loss"):
        np.testing.assert_allclose(world.losses(run, key), world.losses(alone, key), rtol=0, atol=atol)
    evaluations = [[record["loss"] for record in world.records(name, "eval")] for name in (run, alone)]
    np.testing.assert_allclose(*evaluations, rtol=0, atol=atol)
    assert world.losses(run, "lr") == world.losses(alone, "lr")
    np.testing.assert_allclose(world.losses(run, "grad_norm"), world.losses(alone, "grad_norm"), rtol=norm_rtol)
    assert_close_weights(world.weights(run), world.weights(alone), atol=weight_atol)


def test_the_labels_of_the_two_ranks_differ_in_number(world):
    """Otherwise the tests below could not tell a mean of means from a mean over all tokens."""
    cache = LabelCache.open(world.folder / "uneven")
    labelled = [int((cache.window(i) >= 0).any(-1).sum()) for i in range(40)]
    assert min(labelled) == 0 and max(labelled) > 8


@pytest.mark.slow
def test_two_processes_equal_one_with_online_labels(world):
    world.train_on_two("two-online")
    assert_as_one_process(world, "two-online")


@pytest.mark.slow
def test_the_deepspeed_launcher_works(world):
    overrides = uneven(world, "train.zero_stage=2")
    launcher = ("deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), "--module")
    world.train_on_two("two-deepspeed", *overrides, launcher=launcher)
    assert_as_one_process(world, "two-deepspeed", *overrides)


@pytest.mark.slow
def test_an_interrupted_run_on_two_processes_goes_on_bit_for_bit(world):
    more = uneven(world, f"train.tokens={5 * STEPS * 8 * SEQ_LEN}")
    world.train_on_two("two-whole", *more)
    command = world.command("two-parts", *more, launcher=TORCHRUN)
    _, output = world.interrupt(command, "two-parts", after_step=20, number=signal.SIGTERM, threads=1)
    assert "interrupted: saved step " in output
    world.train_on_two("two-parts", *more, "--resume")
    assert_equal_runs(world, "two-whole", "two-parts")


@pytest.mark.slow
def test_what_every_rank_refuses_ends_all_of_them_with_one_line_each(world):
    command = world.command("odd", *uneven(world, "train.global_batch=4"), launcher=TORCHRUN)
    done = subprocess.run(command, env=environment(threads=1), capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "must be a multiple of train.micro_batch (4) x 2 ranks" in done.stderr
    assert not (world.folder / "odd").exists()
