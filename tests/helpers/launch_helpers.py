"""Hosts and a cluster to start runs on, without any: network namespaces joined by a cable, and the few commands of
ssh, pdsh and SLURM that the launchers and our script call."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

_CABLE = "veth0"

# As pdsh's ssh does: `ssh [options] HOST command`, in the namespace that stands for the host, or nowhere.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -[op] ]] && shift; shift; done
host=$1; shift
pid=$(cat "$FAKE_HOSTS/$host" 2>/dev/null) || { echo "ssh: connect to host $host: No route to host" >&2; exit 255; }
if [[ $* == "hostname -I" ]]; then echo "${host}"; exit; fi
exec nsenter -t "$pid" -U -n --preserve-credentials bash -c "$*"
"""
# `pdsh -S -f N -w HOST,HOST command`: on all hosts at once, %n their number; the largest exit code.
PDSH = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -w ]] && hosts=$2; [[ $1 == -[fw] ]] && shift; shift; done
number=0 code=0
for host in ${hosts//,/ }; do
    command="$*"; ssh "$host" "${command//%n/$number}" < /dev/null & pids+=($!); number=$((number + 1))
done
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
# SLURM_NTASKS processes on this machine; the largest exit code. SIGTERM to srun itself kills them all, as in SLURM.
SRUN = f"""#!{sys.executable}
import os, pathlib, signal, subprocess, sys
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
tasks = [subprocess.Popen(command, env={{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}})
         for i in range(int(os.environ["SLURM_NTASKS"]))]
signal.signal(signal.SIGTERM, lambda *_: [task.kill() for task in tasks])
aside = pathlib.Path(os.environ["FAKE_SLURM"], "tasks.new")
aside.write_text(" ".join(str(task.pid) for task in tasks))
aside.rename(aside.with_suffix(""))
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
case $1 in
    show) printf '%s\\n' "${3//,/$'\\n'}" ;;
    requeue) echo "$2" >> "$FAKE_SLURM/requeued" ;;
esac
"""


def free_port() -> int:
    """A port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def write_commands(folder: Path, **commands: str) -> Path:
    """Executable files for a folder that goes first on PATH."""
    folder.mkdir(exist_ok=True)
    for name, text in commands.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


def with_path(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    """The environment with `folder` and the running Python's first on PATH."""
    return environment | {"PATH": f"{folder}:{Path(sys.executable).parent}:{environment['PATH']}"}


class NoNamespacesError(Exception):
    """This kernel or system does not let us make network namespaces; the message says why."""


class Hosts:
    """Network namespaces without any privilege, each with the address ADDRESSES[i] on one cable and a loopback."""

    ADDRESSES = ("10.213.0.1", "10.213.0.2")

    def __init__(self):
        for tool in ("unshare", "nsenter", "ip"):
            if shutil.which(tool) is None:
                raise NoNamespacesError(f"there is no {tool} on this machine")
        self.processes = []
        try:
            self.processes.append(self._hold(["unshare", "--user", "--map-root-user", "--net"]))
            self.processes.append(self._hold([*self.command(0), "unshare", "--net"]))
            peer = str(self.processes[1].pid)
            self._call(0, "ip", "link", "add", _CABLE, "type", "veth", "peer", "name", _CABLE, "netns", peer)
            for number, address in enumerate(self.ADDRESSES):
                self._call(number, "ip", "address", "add", f"{address}/24", "dev", _CABLE)
                for link in ("lo", _CABLE):
                    self._call(number, "ip", "link", "set", link, "up")
        except BaseException:
            self.close()
            raise

    def command(self, number: int) -> list[str]:
        """What to put before a command to run it on a host."""
        return ["nsenter", "-t", str(self.processes[number].pid), "-U", "-n", "--preserve-credentials"]

    def close(self) -> None:
        """Take the namespaces down."""
        for process in self.processes:
            process.kill()
            process.wait()

    @staticmethod
    def _hold(command):
        process = subprocess.Popen(
            [*command, sys.executable, "-c", "print(flush=True); input()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if not process.stdout.readline():
            raise NoNamespacesError(process.communicate()[1].strip())
        return process

    def _call(self, number, *command):
        done = subprocess.run([*self.command(number), *command], capture_output=True, text=True)
        if done.returncode:
            raise NoNamespacesError(done.stderr.strip())


def started(commands: list[list[str]], environment: dict[str, str]) -> list[subprocess.Popen]:
    """Start commands side by side, each in a session of its own, with their output kept."""
    return [
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for command in commands
    ]


def finished(processes: list[subprocess.Popen], timeout: float = 120) -> tuple[list[int], str]:
    """Wait for all; their exit codes and output. Whatever still runs after `timeout` seconds is killed."""
    deadline, outputs = time.monotonic() + timeout, []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(1, deadline - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            for other in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(other.pid, signal.SIGKILL)
            outputs.append(f"KILLED after {timeout} s\n{process.communicate()[0]}")
    return [process.returncode for process in processes], "\n".join(outputs)
