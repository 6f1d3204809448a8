"""Runs started as configs/launch/ says: torchrun and the deepspeed launcher over two hosts, and our SLURM script."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch_helpers import (
    PDSH,
    SCONTROL,
    SRUN,
    SSH,
    Hosts,
    NoNamespacesError,
    finished,
    free_port,
    started,
    with_path,
    write_commands,
)
from run_helpers import assert_close_weights, assert_equal_runs, environment, last_step, uneven

ROOT = Path(__file__).parents[3]
LAUNCH = ROOT / "configs" / "launch"
BIN = Path(sys.executable).parent
LONG = 40  # steps, enough to be interrupted in between


@pytest.fixture(scope="module")
def hosts():
    """Two network namespaces; skips where the system forbids them."""
    try:
        two = Hosts()
    except NoNamespacesError as error:
        pytest.skip(f"no network namespaces here: {error}")
    yield two
    two.close()


def long_run(world):
    """Overrides for a run that can be interrupted in the middle."""
    return uneven(world, f"train.tokens={LONG * 8 * 16}", "train.timeout_minutes=1", "train.eval_every=20")


@pytest.fixture(scope="module")
def uninterrupted(world):
    """The name of such a run on two processes of one host, from its start to its end."""
    world.train_on_two("uninterrupted", *long_run(world))
    return "uninterrupted"


def wait_for_step(run: Path, step: int, processes) -> None:
    """Until a living run has logged `step`."""
    deadline = time.monotonic() + 120
    while last_step(run) < step:
        if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
            raise AssertionError(finished(processes, timeout=1))
        time.sleep(0.01)


# ---------------------------------------------------------------------------------------------- pages


def test_the_pages_name_files_that_exist():
    pages = sorted(LAUNCH.glob("*.md"))
    assert [page.stem for page in pages] == ["deepspeed", "slurm", "torchrun"]
    for page in pages:
        named = set(re.findall(r"configs/[\w./-]*\w", page.read_text()))
        assert named and all((ROOT / name).exists() for name in named), named
        linked = re.findall(r"\]\(([\w./-]+)\)", page.read_text())
        assert all((LAUNCH / link).exists() for link in linked), linked


# ---------------------------------------------------------------------------------------------- two hosts


def on_two_hosts(hosts, world, run, *overrides):
    """The commands of configs/launch/torchrun.md, one for each host."""
    port = str(free_port())
    return [
        [
            *hosts.command(number),
            str(BIN / "torchrun"),
            "--nnodes",
            "2",
            "--node-rank",
            str(number),
            "--nproc-per-node",
            "1",
            "--master-addr",
            hosts.ADDRESSES[0],
            "--master-port",
            port,
            "-m",
            "cocomix",
            "train",
            str(world.config),
            f"train.run={world.folder / run}",
            *overrides,
        ]
        for number in range(2)
    ]


@pytest.mark.slow
def test_torchrun_on_two_hosts_stops_on_one_goes_on_and_ends_as_on_one_host(hosts, world, uninterrupted):
    more = long_run(world)
    agents = started(on_two_hosts(hosts, world, "two-hosts", *more), environment(threads=1))
    wait_for_step(world.folder / "two-hosts", 12, agents)
    agents[1].send_signal(signal.SIGTERM)
    codes, output = finished(agents)
    assert all(codes) and "interrupted: saved step " in output, output
    assert last_step(world.folder / "two-hosts") < LONG
    codes, output = finished(started(on_two_hosts(hosts, world, "two-hosts", *more, "--resume"), environment(1)))
    assert codes == [0, 0], output
    assert_equal_runs(world, uninterrupted, "two-hosts")


@pytest.fixture
def cluster(hosts, tmp_path):
    """A hostfile of the two hosts, and an environment with ssh and pdsh that reach them."""
    (tmp_path / "hosts").mkdir()
    for address, process in zip(hosts.ADDRESSES, hosts.processes, strict=True):
        (tmp_path / "hosts" / address).write_text(str(process.pid))
    (tmp_path / "hostfile").write_text("".join(f"{address} slots=1\n" for address in hosts.ADDRESSES))
    folder = write_commands(tmp_path / "bin", ssh=SSH, pdsh=PDSH)
    # Our environment does not travel over ssh; what is named in this file does.
    (tmp_path / "deepspeed_env").write_text("OMP_NUM_THREADS=1\n")
    return with_path(folder, environment()) | {
        "FAKE_HOSTS": str(tmp_path / "hosts"),
        "DS_ENV_FILE": str(tmp_path / "deepspeed_env"),
    }


@pytest.mark.slow
def test_the_deepspeed_launcher_reaches_the_hosts_of_a_hostfile(cluster, world, tmp_path):
    more = uneven(world, "train.zero_stage=2")
    command = [
        str(BIN / "deepspeed"),
        "--hostfile",
        str(tmp_path / "hostfile"),
        "--master_port",
        str(free_port()),
        "--module",
        "cocomix",
        "train",
        str(world.config),
        f"train.run={world.folder / 'hostfile'}",
        *more,
    ]
    codes, output = finished(started([command], cluster))
    assert codes == [0] and "nnodes=2" in output, output
    assert world.train("one-process", *more) == 0
    assert_close_weights(world.weights("hostfile"), world.weights("one-process"), atol=1e-5)


def test_a_hostfile_that_names_no_reachable_host_is_the_launchers_to_refuse(tmp_path):
    """Not our message; configs/launch/deepspeed.md quotes it."""
    (tmp_path / "hostfile").write_text("node1 slots=1\nnode2 slots=1\n")
    reach_nobody = with_path(write_commands(tmp_path / "bin", ssh=SSH), environment()) | {"FAKE_HOSTS": str(tmp_path)}
    command = [str(BIN / "deepspeed"), "--hostfile", str(tmp_path / "hostfile"), "--module", "cocomix", "--version"]
    codes, output = finished(started([command], reach_nobody))
    said = "host=node1 was not reachable via ssh"
    assert codes == [1] and said in output, output
    assert said in (LAUNCH / "deepspeed.md").read_text()


# ---------------------------------------------------------------------------------------------- SLURM


class Slurm:
    """As much of SLURM as our script calls, for one job."""

    def __init__(self, folder: Path, **commands: str):
        self.folder = folder
        bin_folder = write_commands(folder / "bin", **commands)
        self.environment = with_path(bin_folder, environment(threads=1)) | {
            "FAKE_SLURM": str(folder),
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_JOB_NODELIST": "127.0.0.1,10.1.1.1",
            "SLURM_NTASKS": "2",
            "SLURM_CPUS_PER_TASK": "1",
        }

    def start(self, *arguments) -> subprocess.Popen:
        """What sbatch does when the job's turn comes: run a copy of the script, here in the folder of the job."""
        (self.folder / "tasks").unlink(missing_ok=True)
        script = self.folder / "slurm_script"
        script.write_text((LAUNCH / "train.sbatch").read_text())
        return subprocess.Popen(
            ["bash", str(script), *map(str, arguments)],
            env=self.environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def signal_steps(self, number: int) -> None:
        """What SLURM does before the time is up, by --signal=TERM@300: the processes get it, the script does not."""
        for process in (self.folder / "tasks").read_text().split():
            os.kill(int(process), number)

    @property
    def requeued(self) -> int:
        """How often the job was."""
        file = self.folder / "requeued"
        return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.slow
def test_the_slurm_script_saves_requeues_and_ends_as_if_never_interrupted(world, uninterrupted, tmp_path):
    slurm = Slurm(tmp_path, srun=SRUN, scontrol=SCONTROL)
    arguments = [world.config, *long_run(world)]
    job = slurm.start(world.folder / "job", *arguments)
    wait_for_step(world.folder / "job", 12, [job])
    slurm.signal_steps(signal.SIGTERM)
    codes, output = finished([job])
    assert codes == [75] and slurm.requeued == 1, output
    assert output.count("interrupted: saved step ") == 1
    assert 12 <= last_step(world.folder / "job") < LONG

    codes, output = finished([slurm.start(world.folder / "job", *arguments)])
    assert codes == [0] and "finished" in output and slurm.requeued == 1, output
    assert_equal_runs(world, uninterrupted, "job")


# The newest checkpoint that the script's question finds, then what the processes do to it and how they end.
SRUN_THAT_ENDS = """#!/bin/bash
echo "srun $*" >> "$FAKE_SLURM/calls"; env | grep -E '^(MASTER_|SRUN_|OMP_)' >> "$FAKE_SLURM/calls"
[ -z "$SAVES" ] || echo step-00000002 > "$FAKE_SLURM/newest"
[ -z "$CANCELLED" ] || { kill -TERM $PPID; sleep 0.2; }
exit $CODE
"""
PYTHON = """#!/bin/bash
cat "$FAKE_SLURM/newest"
"""


@pytest.mark.parametrize(
    ("code", "saves", "cancelled", "requeued", "said"),
    [
        (0, True, False, False, "finished"),
        (75, True, False, True, "saved before the time was up"),
        (75, False, False, True, "saved before the time was up"),  # at the step of the newest checkpoint
        (75, True, True, False, "cancelled"),  # else a cancelled job would come back
        (137, True, False, True, "with a newer checkpoint"),  # a process that died after hours
        (2, True, False, True, "with a newer checkpoint"),  # and what the others say then
        (2, False, False, False, "not requeued"),  # bad input would fail for ever
        (130, False, False, False, "not requeued"),  # the time was up before training began
    ],
)
def test_the_slurm_script_requeues_what_can_go_on(tmp_path, code, saves, cancelled, requeued, said):
    slurm = Slurm(tmp_path, srun=SRUN_THAT_ENDS, scontrol=SCONTROL, python=PYTHON)
    slurm.environment |= {"CODE": str(code), "SAVES": "1" * saves, "CANCELLED": "1" * cancelled}
    (tmp_path / "newest").write_text("step-00000001\n")
    codes, output = finished([slurm.start("runs/it", "it.yaml", "train.lr=1e-3", "data.text=[a b]")])
    assert codes == [code] and said in output and slurm.requeued == requeued, output
    calls = (tmp_path / "calls").read_text()
    assert "cocomix it.yaml train.run=runs/it train.lr=1e-3 data.text=[a b] --resume" in calls
    port = re.search(r"MASTER_PORT=(\d+)", calls)[1]
    assert 20000 <= int(port) < 30000 and "MASTER_ADDR=127.0.0.1\n" in calls and "SRUN_CPUS_PER_TASK=1\n" in calls


def test_the_slurm_script_says_how_it_is_called(tmp_path):
    codes, output = finished([Slurm(tmp_path, scontrol=SCONTROL).start("runs/it")])
    assert codes == [2] and output.startswith("usage: sbatch train.sbatch RUN CONFIG")
