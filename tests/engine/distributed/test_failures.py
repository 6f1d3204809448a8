"""Ranks that hang, die or were started with something else, in real processes."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from run_helpers import World, environment, last_step, uneven

from cocomix.data.preparation import prepare
from cocomix.distributed.failures import failures_named, require_agreement
from cocomix.distributed.ranks import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    world.add_uneven_labels("uneven")
    return world


@pytest.fixture
def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(world, run, *overrides_by_rank, port):
    """`cocomix train` on as many processes as there are lists of overrides, without a launcher."""
    common = {"WORLD_SIZE": str(len(overrides_by_rank)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "cocomix",
                "train",
                str(world.config),
                f"train.run={world.folder / run}",
                *uneven(world),
                *overrides,
            ],
            env={**environment(threads=1), **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, overrides in enumerate(overrides_by_rank)
    ]


def outcome(process, timeout=90):
    """The exit code and the last line of the output, which holds no traceback."""
    output = process.communicate(timeout=timeout)[0]
    assert "Traceback" not in output, output
    return process.returncode, output.strip().splitlines()[-1]


def wait_for_step(world, run, step, processes):
    deadline = time.monotonic() + 90
    while last_step(world.folder / run) < step:
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("hung", [0, 1])
def test_a_rank_that_hangs_is_named_by_the_other(world, free_port, hung):
    """Also where it is the one that holds the store through which ranks are asked."""
    run, endless = f"hang-{hung}", ["train.tokens=100000000", "train.timeout_minutes=0.4"]
    processes = start(world, run, endless, endless, port=free_port)
    try:
        wait_for_step(world, run, 3, processes)
        processes[hung].send_signal(signal.SIGSTOP)
        code, line = outcome(processes[1 - hung])
        assert code == 2 and line.startswith(f"cocomix train: error: rank {hung} (host ")
        assert f"process {processes[hung].pid}) did not come to a collective in time: it hangs" in line
    finally:
        for process in processes:
            process.kill()
            process.wait()


@pytest.mark.slow
def test_the_death_of_a_rank_is_said_in_one_line_by_the_others(world, free_port):
    endless = ["train.tokens=100000000"]
    processes = start(world, "death", endless, endless, port=free_port)
    wait_for_step(world, "death", 3, processes)
    os.kill(processes[1].pid, signal.SIGKILL)
    code, line = outcome(processes[0])
    assert code == 2 and "another rank ended: its own output, or the launcher's, says which and why" in line


@pytest.mark.slow
def test_ranks_with_different_settings_refuse_to_start(world, free_port):
    processes = start(world, "differing", [], ["train.lr=2e-3", "train.seed=1"], port=free_port)
    for process in processes:
        code, line = outcome(process)
        assert code == 2 and "the ranks disagree: on rank 1 (host " in line
        assert "train.lr is 0.002 and 0.001 on rank 0; train.seed is 1 and 0 on rank 0" in line
    assert not (world.folder / "differing").exists()


@pytest.mark.slow
def test_ranks_with_different_data_refuse_to_start(world, free_port, tmp_path):
    (tmp_path / "text.txt").write_text("the dog sleeps " * 1000)
    prepare(world.load(f"data.text=['{tmp_path / 'text.txt'}']", f"data.folder={tmp_path}").data)
    ntp = ["model.mixing=none"]
    processes = start(world, "other-data", ntp, [*ntp, f"data.folder={tmp_path}"], port=free_port)
    for process in processes:
        code, line = outcome(process)
        assert code == 2 and "the ranks disagree" in line and "the text's fingerprint is" in line


def test_a_single_process_agrees_with_itself_and_its_errors_stay_its_own():
    require_agreement(ALONE, {"a": 1})
    with pytest.raises(RuntimeError, match="gloo"), failures_named(ALONE):
        raise RuntimeError("gloo: Timed out")
