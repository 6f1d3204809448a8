"""Start-up: what launchers announce, and processes that do not find each other."""

import os
import socket
import subprocess
import sys

import psutil
import pytest
import torch
from launch_helpers import free_port
from run_helpers import environment

from cocomix.core.errors import CocomixError
from cocomix.distributed.launch import (
    alone_unless_announced,
    announced_local_rank,
    announced_master,
    announced_ranks,
    meeting,
)
from cocomix.distributed.ranks import own_device, process_group

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")
HALF_A_SECOND = 0.5 / 60  # in minutes


@pytest.fixture
def announce(monkeypatch):
    """Set the launcher's variables to these and no others; `announce.two` is a rank of two on this machine."""

    def announce(**values):
        for name in VARIABLES:
            monkeypatch.setenv(name, "")  # what the code under test sets is taken back as well
            monkeypatch.delenv(name)
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    announce.two = lambda rank, port, host="127.0.0.1": announce(
        RANK=rank, WORLD_SIZE=2, LOCAL_RANK=rank, MASTER_ADDR=host, MASTER_PORT=port
    )
    return announce


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"RANK": "one", "WORLD_SIZE": 2}, "RANK is 'one', which is not a number"),
        ({"RANK": 1, "WORLD_SIZE": "2,0"}, "WORLD_SIZE is '2,0', which is not a number"),
        ({"RANK": 0}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": 2}, "WORLD_SIZE is 2 but RANK is not set"),
        ({"RANK": 2, "WORLD_SIZE": 2}, "RANK is 2 and WORLD_SIZE 2: give every process its own RANK from 0"),
        ({"RANK": -1, "WORLD_SIZE": 2}, "RANK is -1 and WORLD_SIZE 2"),
        ({"RANK": 0, "WORLD_SIZE": 0}, "RANK is 0 and WORLD_SIZE 0"),
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_PORT": 29500}, "MASTER_ADDR is not set, though RANK is"),
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "here"}, "MASTER_PORT is not set"),
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "here", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "here", "MASTER_PORT": 99999}, "MASTER_PORT is 99999; it must be"),
        ({"RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "here", "MASTER_PORT": 0}, "MASTER_PORT is 0; it must be"),
    ],
)
def test_variables_that_cannot_be_are_refused_in_one_line(announce, values, message):
    announce(**values)
    with pytest.raises(CocomixError, match=message) as refusal, process_group(1):
        pass
    assert "\n" not in str(refusal.value)
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("size", "number"),
    [
        ("SLURM_NTASKS", "SLURM_PROCID"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
        ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
        ("PMI_SIZE", "PMI_RANK"),
    ],
)
def test_processes_of_another_launcher_are_not_each_alone(announce, monkeypatch, size, number):
    announce()
    for rank in ("0", "1"):
        monkeypatch.setenv(size, "2")
        monkeypatch.setenv(number, rank)
        with pytest.raises(
            CocomixError, match=f"has 2 processes, of which this is number {rank}, but RANK is not set: "
        ):
            announced_ranks()
        with pytest.raises(CocomixError, match=rf"set RANK=\${number} WORLD_SIZE=\${size} "), process_group(1):
            pass
    monkeypatch.setenv(size, "1")
    assert announced_ranks() == (0, 1)
    monkeypatch.setenv(size, "2")
    announce(RANK=1, WORLD_SIZE=2)  # whoever sets both knows better
    assert announced_ranks() == (1, 2)


def test_what_a_launcher_announces_is_taken(announce):
    announce.two(1, 29500, host="node1")
    assert announced_ranks() == (1, 2) and announced_local_rank() == 1 and announced_master() == ("node1", 29500)
    announce()
    assert announced_ranks() == (0, 1) and announced_local_rank() == 0


def test_several_processes_without_local_ranks_would_share_a_gpu(announce, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    announce(RANK=1, WORLD_SIZE=2)
    with pytest.raises(CocomixError, match="LOCAL_RANK is not set"):
        own_device()
    announce(RANK=1, WORLD_SIZE=2, LOCAL_RANK=-1)
    with pytest.raises(CocomixError, match="LOCAL_RANK is -1"):
        own_device()
    announce()
    assert own_device() == torch.device("cuda", 0)


def test_a_process_that_is_alone_takes_any_free_port(announce):
    announce()
    before = dict(os.environ)
    with alone_unless_announced():
        assert announced_ranks() == (0, 1) and announced_master() == ("127.0.0.1", 0)
    assert dict(os.environ) == before
    announce.two(1, 29500)
    with alone_unless_announced():
        assert announced_ranks() == (1, 2)


def test_a_port_in_use_is_named(announce):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        announce.two(0, port)
        with pytest.raises(CocomixError, match=f"port {port} is in use on this machine: set another MASTER_PORT"):
            with process_group(HALF_A_SECOND):
                pass
    announce()
    with process_group(1) as ranks:  # the failure has left nothing behind
        assert ranks.world == 1


@pytest.mark.parametrize(("host", "reason"), [("127.0.0.1", "Connection refused"), ("nowhere", "Name not known")])
def test_a_first_process_that_cannot_be_reached_is_named(announce, host, reason, capfd, monkeypatch):
    def look_up(*_arguments):
        raise socket.gaierror(socket.EAI_NONAME, "Name not known")

    if host == "nowhere":
        monkeypatch.setattr(socket, "getaddrinfo", look_up)
    port = free_port()
    announce.two(1, port, host)
    message = rf"rank 0 cannot be reached at {host}:{port} \({reason}; tried for 0.5 s\): check MASTER_ADDR"
    with pytest.raises(CocomixError, match=message), process_group(HALF_A_SECOND):
        pass
    assert capfd.readouterr().err == f"waiting for rank 0 at {host}:{port} ({reason})\n"


def test_others_that_do_not_come_are_counted(announce):
    port = free_port()
    announce.two(0, port)
    with pytest.raises(CocomixError, match=rf"only 1 of 2 processes came.*\(127.0.0.1:{port}\)"):
        with process_group(1.5 / 60):
            pass


def test_a_first_process_that_comes_later_is_waited_for(announce):
    port = free_port()
    later = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                f"import socket, time; time.sleep(1); s = socket.socket(); s.bind(('127.0.0.1', {port})); s.listen(); "
                "s.accept()"
            ),
        ]
    )
    announce.two(1, port)
    try:
        with meeting(20):
            pass
        assert later.wait(10) == 0
    finally:
        later.kill()


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (
            0,
            "The client socket has timed out after 3000ms while trying to connect to (node9, 29500).",
            "rank 0 does not reach itself at 127.0.0.1:29500: MASTER_ADDR must name the machine",
        ),
        (
            0,
            "Gloo connectFullMesh failed with [pair.cc:152] timed out connecting\nmore",
            r"cannot join \(Gloo connectFullMesh failed .*timed out connecting\): .*GLOO_SOCKET_IFNAME",
        ),
        (0, "", r"cannot join \(no reason given\)"),
    ],
)
def test_what_else_keeps_processes_apart_is_explained(announce, rank, error, message):
    announce.two(rank, 29500)
    with pytest.raises(CocomixError, match=message), meeting(1):
        raise RuntimeError(error)


def test_gloo_takes_the_interface_that_leads_to_the_first_process(announce):
    outside = [
        (name, address.address)
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family == socket.AF_INET and not address.address.startswith("127.")
    ]
    if not outside:
        pytest.skip("this machine has the loopback's interface alone")
    name, address = outside[0]
    announce.two(0, 29500, address)
    with meeting(1):
        assert os.environ["GLOO_SOCKET_IFNAME"] == name
    announce.two(0, 29500, address)
    os.environ["GLOO_SOCKET_IFNAME"] = "mine"
    with meeting(1):
        assert os.environ["GLOO_SOCKET_IFNAME"] == "mine"
    announce.two(0, 29500)
    with meeting(1):
        assert "GLOO_SOCKET_IFNAME" not in os.environ


def test_the_command_line_says_it_in_one_line(tmp_path):
    variables = {"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    (tmp_path / "config.yaml").write_text("train: {run: run}")
    done = subprocess.run(
        [sys.executable, "-m", "cocomix", "train", "config.yaml"],
        cwd=tmp_path,
        timeout=60,
        env=environment() | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("cocomix train: error: RANK is 2 and WORLD_SIZE 2")
