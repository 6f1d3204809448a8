"""What each method brings at which cost: methods, seeds and budgets of one size, trained and compared.

    python benchmarks/frontier.py [FOLDER] [KEY=VALUE ...] [--methods ntp,residual] [--seeds 0,1,2]
        [--budgets 0.2,0.4,0.6,1] [--jobs 2] [--list]

FOLDER (default: configs/frontier/1m) holds teacher.yaml, student.yaml and methods/NAME.yaml, each of which names
../student.yaml as its base; every file in methods/ is an arm, and `ntp` is what the others are compared with. Settings
(`KEY=VALUE`) go to every command. One run a method and seed trains for train.tokens with a rate that stays (wsd); the
smaller budgets, shares of train.tokens, begin with a checkpoint of it and only decay. What takes no cache or teacher
of the students' begins when it can: `cocomix data`, `train` (the teacher), `sae` and `labels` come first, one by one,
then `--jobs` families of runs side by side, which share the cores.

Everything goes on where it stopped: interrupt it (Ctrl-C) and start it again. Checkpoints of a family are deleted when
all of its runs have finished. At the end `cocomix report` writes OUT/report, a page and comparison.json. `--list`
prints the commands instead, a line for each step or family, for a cluster's own queue: lines of a later stage need
those of the earlier ones.
"""

import argparse
import contextlib
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from cocomix.core.config import Config, load_config
from cocomix.core.errors import CocomixError
from cocomix.teacher.supervision import wanted_kinds
from cocomix.training.schedule import decay_start

COCOMIX = [sys.executable, "-m", "cocomix"]
CHILDREN: set[subprocess.Popen] = set()  # commands that run
FOLDER = "configs/frontier/1m"  # a million parameters: what two cores train in hours
FULL = "full"  # the run of a family that trains for all tokens


@dataclass(frozen=True)
class Family:
    """The runs of a method and a seed: the longest first, then those that begin with a checkpoint of it."""

    commands: dict[Path, list[str]]  # by the run's folder

    @property
    def missing(self) -> list[list[str]]:
        """The commands of runs that have no model yet. A finished run is not started again: where its checkpoints are
        gone it would begin anew."""
        return [command for run, command in self.commands.items() if not (run / "model/config.json").exists()]

    def drop_checkpoints(self) -> None:
        """Delete the checkpoints, which nothing begins with any more."""
        for run in self.commands:
            for part in (run, run / "first"):  # that of a student that teaches itself
                shutil.rmtree(part / "checkpoints", ignore_errors=True)


def main(arguments=None) -> int:
    """Train what is missing and report; 2 for settings that cannot be run, 75 where it was interrupted."""
    options = parse(arguments)
    try:
        preparation, families, out = plan(options)
        if options.list:
            for command in preparation:
                print(shlex.join(command))
            for family in families:
                print(" && ".join(shlex.join(command) for command in family.commands.values()))
            return 0
        return run(preparation, families, out, options.jobs)
    except CocomixError as error:
        print(f"frontier: {error}", file=sys.stderr)
        return 2


def parse(arguments):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", default=FOLDER, metavar="FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--methods", type=lambda text: text.split(","), help="files of methods/ (default: all)")
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2], help="default: 0,1,2")
    parser.add_argument("--budgets", type=numbers(float), default=[0.2, 0.4, 0.6, 1.0], help="default: 0.2,0.4,0.6,1")
    parser.add_argument("--jobs", type=int, default=2, help="families side by side (default: 2)")
    parser.add_argument("--list", action="store_true", help="print the commands instead")
    options = parser.parse_intermixed_args(arguments)
    if "=" in options.folder:
        options.folder, options.overrides = FOLDER, [options.folder, *options.overrides]
    if not all(0 < budget <= 1 for budget in options.budgets):
        parser.error("--budgets are shares of train.tokens: above 0, at most 1")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    return options


def numbers(kind):
    """What reads "0,1,2" as a sorted list of a kind of numbers."""

    def read(text: str) -> list:
        return sorted({kind(part) for part in text.split(",")})

    read.__name__ = f"list of {kind.__name__}"  # in argparse's message
    return read


def plan(options) -> tuple[list[list[str]], list[Family], Path]:
    """Commands that prepare, families of runs, and the folder that all of it is in."""
    folder, overrides = Path(options.folder), options.overrides
    files = {path.stem: path for path in sorted((folder / "methods").glob("*.yaml"))}
    wanted = options.methods or list(files)
    unknown = [name for name in wanted if name not in files]
    if unknown or not files:
        raise CocomixError(
            f"{folder / 'methods'} has no {unknown[0] if unknown else 'method'}.yaml; it has: {', '.join(files) or '-'}"
        )
    configs = {name: load_config(files[name], overrides) for name in wanted}
    out = Path(load_config(folder / "student.yaml", overrides).out)
    families = [family(name, seed, files[name], configs[name], options) for seed in options.seeds for name in configs]
    for name, config in configs.items():
        if too_short := [budget for budget in options.budgets if not has_second_part(config, budget)]:
            shares = ", ".join(f"{budget:g}" for budget in too_short)
            print(f"frontier: {name} teaches itself too late for budgets of {shares}: left out", file=sys.stderr)
    return list(preparation(folder, {files[name]: configs[name] for name in wanted}, overrides)), families, out


def preparation(folder: Path, configs: dict[Path, Config], overrides: list[str]) -> Iterator[list[str]]:
    """Data, teacher, SAE and caches; what two methods share once."""
    teacher, student = str(folder / "teacher.yaml"), str(folder / "student.yaml")
    yield [*COCOMIX, "data", teacher, *overrides]
    yield [*COCOMIX, "train", teacher, *overrides, "--resume"]
    yield [*COCOMIX, "data", student, *overrides]
    yield [*COCOMIX, "sae", student, *overrides]
    cached = set()
    for path, config in configs.items():
        caches = {kind.cache_folder(config) for kind in wanted_kinds(config)} - {None}
        if caches - cached:
            cached |= caches
            yield [*COCOMIX, "labels", str(path), *overrides]


def family(method: str, seed: int, path: Path, config: Config, options) -> Family:
    """The commands of a method's runs with a seed, the longest first."""
    folder = Path(config.out) / "runs" / method / f"seed-{seed}"
    commands = {}
    for budget in sorted({*options.budgets, 1.0}, reverse=True):
        if not has_second_part(config, budget):
            continue
        tokens = round(budget * config.total_steps) * config.tokens_per_step
        run = folder / (FULL if budget == 1 else f"{tokens}-tokens")
        command = [*COCOMIX, "train", str(path), *options.overrides, f"train.seed={seed}", f"train.run={run}"]
        command += [f"train.tokens={tokens}", "--resume"]
        commands[run] = command if budget == 1 else [*command, "--branch-from", str(folder / FULL)]
    return Family(commands)


def has_second_part(config: Config, budget: float) -> bool:
    """Whether a run of this share of train.tokens teaches itself before its rate falls, where it does at all."""
    first = math.ceil(config.teacher.self_taught_after / config.tokens_per_step)
    return first <= decay_start(config.train, round(budget * config.total_steps))


def run(preparation: list[list[str]], families: list[Family], out: Path, jobs: int) -> int:
    """Everything that is missing, then the report."""
    todo = [family for family in families if family.missing]
    interrupted = threading.Event()
    with forwarded_interrupts(interrupted):
        if todo:
            for command in preparation:
                if not call(command, interrupted):
                    return stopped()
        with ThreadPoolExecutor(jobs) as pool:
            done = list(pool.map(lambda family: complete(family, jobs, interrupted), todo))
        if not all(done):
            return stopped()
        runs = [str(run) for family in families for run in family.commands]
        report = [*COCOMIX, "report", *runs, "--out", str(out / "report"), "--json", str(out / "comparison.json")]
        return 0 if call(report, interrupted) else stopped()


def complete(family: Family, jobs: int, interrupted: threading.Event) -> bool:
    """Train the family's runs one after the other; whether all have finished."""
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    for command in family.missing:
        if not call(command, interrupted, threads):
            return False
    family.drop_checkpoints()
    return True


def call(command: list[str], interrupted: threading.Event, threads: int | None = None) -> bool:
    """Run a command, which goes on where it stopped; False where it was interrupted.

    Raises `CocomixError` where it fails.
    """
    if interrupted.is_set():
        return False
    print("+", shlex.join(command[2:]), flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads and not torch.cuda.is_available() else {})
    process = subprocess.Popen(command, env=environment, start_new_session=True)  # Ctrl-C reaches it through us
    CHILDREN.add(process)
    code = process.wait()
    CHILDREN.discard(process)
    if interrupted.is_set():
        return False
    if code:
        interrupted.set()
        raise CocomixError(f"`{shlex.join(command[1:])}` ended with {code}; what it said is above")
    return True


@contextlib.contextmanager
def forwarded_interrupts(interrupted: threading.Event):
    """Inside, SIGINT and SIGTERM reach the commands that run, which save and leave, and set the event."""

    def forward(number, _frame):
        interrupted.set()
        for process in list(CHILDREN):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped() -> int:
    """Say how to go on."""
    print("frontier: interrupted; the same command goes on where it stopped", file=sys.stderr)
    return 75


if __name__ == "__main__":
    raise SystemExit(main())
