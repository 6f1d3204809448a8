"""Damages every kind of file that the program reads, one at a time, and sees what the command that reads it does.

    python tests/helpers/corrupt_files.py --cases 3000 --seed 0

Each case takes a fresh copy of a small world, damages one file (`corruptions.py`) and runs the command that reads it
(`corrupt_kinds.py`). A command may refuse, in one line; it may come to the result that it comes to without the damage;
or it may say what it did about the damaged file. All else is bad: another result without a word, a traceback, several
lines, a crash, a process that does not end. Exit code 1 where something bad was found.

This process imports everything once and forks the commands from itself: most cases take less than half a second.
Cases follow from the seed and their number, in the same world to the byte: --world keeps one, since two differ in what
is measured in them.
"""

import argparse
import ctypes
import dataclasses
import hashlib
import importlib
import json
import os
import pkgutil
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # before anything reads it: a process with threads must not fork, and nothing is fetched
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1", MPLBACKEND="agg")
    os.environ.update(JE_ARROW_MALLOC_CONF="background_thread:false", HF_HOME="hub")  # in a command's working folder

from corrupt_kinds import KINDS, Kind, masked
from corrupt_world import make_world
from corruptions import damage
from forked_ranks import import_all, in_a_child

import cocomix
from cocomix.cli import main as cocomix_main

PATIENCE_S = 60.0
MEMORY_BYTES, FILE_BYTES = 4 << 30, 256 << 20  # that a command may take beyond what it begins with, and write
LONGEST_LINE = 300  # of what is shown of it
GOOD = ("error", "right", "said", "cannot be told")
BAD = ("silent", "traceback", "lines", "crash", "hang", "other code")
_BAR = re.compile(r"\d+%\||\[\d+:\d\d[<,]|\bB/s\]|tok/s\]|step/s\]")
_MISSING = "newly initialized because missing"  # what transformers says of weights that a file should have held
_NUMBER = re.compile(r"\d+([.,]\d+)*(e[-+]?\d+)?")


@dataclass(frozen=True)
class Run:
    """What a command has left: its exit code (None: it had to be killed), what it said, and what matters of it."""

    code: int | None
    output: str
    errors: str
    result: object


@dataclass(frozen=True)
class Case:
    """A damaged file and what came of it."""

    number: int
    kind: str
    file: str
    damage: str
    outcome: str
    last_line: str
    seconds: float


class Command:
    """A command in a process of its own, which works in `world`."""

    def __init__(self, world: Path, arguments: tuple[str, ...]):
        self._world, self._began = world, time.monotonic()
        self._logs = [world.parent / name for name in ("stdout", "stderr")]
        self._pid = os.fork()
        if self._pid == 0:
            _run_and_exit(world, arguments, self._logs)
        self.seconds = 0.0

    def ended(self) -> tuple[bool, int | None]:
        """Whether it has ended or has been killed for taking too long, and its exit code."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        self.seconds = time.monotonic() - self._began
        late = not pid and self.seconds > PATIENCE_S
        if not pid and not late:
            return False, None
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)  # what it has started too
        if late:
            os.waitpid(self._pid, 0)
        return True, None if late else os.waitstatus_to_exitcode(status)

    def said(self) -> list[str]:
        """What went to its two streams."""
        return [log.read_text(errors="replace") for log in self._logs]


def _run_and_exit(world: Path, arguments: tuple[str, ...], logs: list[Path]) -> None:
    """In the forked process: be a program of its own."""
    code = 1
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it does not outlive this program
        for descriptor, log in enumerate(logs, start=1):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
        os.chdir(world)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.fsync = lambda _descriptor: None  # nobody pulls the plug here
        code = cocomix_main(list(arguments))
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Running:
    """A case that is being run, or a command of an undamaged world (`number` None)."""

    def __init__(self, harness: "Harness", kind: Kind, number: int | None):
        self.kind, self.number, self._began = kind, number, time.monotonic()
        self.folder = harness.folder / f"case-{'clean' if number is None else number}"
        shutil.rmtree(self.folder, ignore_errors=True)
        world = self.folder / "world"
        shutil.copytree(harness.world, world, copy_function=os.link)
        self.file, self.damage = Path(), ""
        if number is not None:
            draw = random.Random(f"{harness.seed}/{number}")
            files = kind.find(world)
            self.file = files[int(draw.random() * len(files))]
            self.damage = damage(world / self.file, draw)
        self.command = Command(world, kind.command)

    def finished(self) -> Run | None:
        """What it has left, once it has ended."""
        ended, code = self.command.ended()
        if not ended:
            return None
        output, errors = self.command.said()
        try:
            result = self.kind.result(self.folder / "world", masked(output)) if code == 0 else None
        except (OSError, ValueError) as error:
            result = f"there is no result: {error}"
        return Run(code, output, errors, result)

    def case(self, run: Run, clean: Run) -> Case:
        """It, classified by what there would have been without damage."""
        outcome = classify(run, clean, self.file)
        if outcome == "silent" and self.kind.untold and _MISSING not in run.errors:
            outcome = "cannot be told"
        by_signal = f"ended by signal {-run.code}" if run.code is not None and run.code < 0 else ""
        said, seconds = last_line(run.errors) or by_signal, time.monotonic() - self._began
        return Case(self.number or 0, self.kind.name, str(self.file), self.damage, outcome, said, seconds)


def last_line(errors: str) -> str:
    """What a command said last, progress bars aside; of a traceback, where in the program it came from too."""
    lines = [line for line in errors.splitlines() if line.strip() and not _BAR.search(line)]
    frames = re.findall(r'File "\S*?(cocomix/[^"]+)", line (\d+), in (\S+)', errors)
    where = f"{frames[-1][0]}, line {frames[-1][1]}, {frames[-1][2]}: " if frames else ""
    return where + lines[-1][:LONGEST_LINE] if lines else ""


def classify(run: Run, clean: Run, file: Path) -> str:
    """The outcome of a command that reads the damaged `file`, against that of the same command without damage."""
    if run.code is None:
        return "hang"
    if run.code < 0:
        return "crash"
    if run.code == 2:
        lines = [line for line in _new_lines(run.errors, clean.errors) if not line.startswith("note:")]
        return "error" if len(lines) == 1 and re.match(r"cocomix \w+: error: \S", lines[0]) else "lines"
    if "Traceback (most recent call last)" in run.errors:
        return "traceback"
    if run.code != 0:
        return "other code"
    new = _new_lines(run.output, clean.output) + _new_lines(run.errors, clean.errors)
    if any(names(line, file) for line in new):
        return "said"
    return "right" if run.result == clean.result else "silent"


def _new_lines(text: str, before: str) -> list[str]:
    """Lines that were not there before, whatever numbers are in them; but for progress bars."""
    known = {_NUMBER.sub("#", line) for line in before.splitlines()}
    lines = [line for line in text.splitlines() if line.strip() and not _BAR.search(line)]
    return [line for line in lines if _NUMBER.sub("#", line) not in known]


def names(line: str, file: Path) -> bool:
    """Whether a line speaks of a file: by its name, by that of its checkpoint, or as a shard of its cache."""
    shard = re.search(r"-(\d{6})\.bin$", file.name)
    checkpoint = re.search(r"step-\d{8}", str(file))
    return (
        file.name in line
        or (checkpoint is not None and checkpoint[0] in line)
        or (shard is not None and f"shard {int(shard[1])} of {file.parent}" in line)
    )


class Harness:
    """A world, the outcomes of commands in it, and cases."""

    def __init__(self, folder: Path, world: Path, seed: int):
        self.folder, self.world, self.seed = folder, world, seed
        if not world.exists():
            in_a_child(lambda: make_world(world))
        self._clean: dict[tuple, Run] = {}
        self._as_made = self._fingerprint()

    def _fingerprint(self) -> dict[Path, bytes]:
        """What the world holds."""
        files = [file for file in self.world.rglob("*") if file.is_file()]
        return {file: hashlib.sha256(file.read_bytes()).digest() for file in files}

    def require_untouched(self) -> None:
        """Raise `RuntimeError` where a command has changed the world of which it had a copy."""
        if self._fingerprint() != self._as_made:
            raise RuntimeError(f"{self.world} has changed: a command wrote into a file that it had found")

    def clean(self, kind: Kind) -> Run:
        """What the command of a kind leaves without damage; twice, since it must be the same to be compared with."""
        key = kind.command, kind.result
        if key not in self._clean:
            first, second = (self._finish(Running(self, kind, None)) for _ in range(2))
            if first.code != 0:
                raise RuntimeError(f"{' '.join(kind.command)} fails without damage: {last_line(first.errors)}")
            if first.result != second.result:
                raise RuntimeError(f"{' '.join(kind.command)} has two results without damage: {first}, {second}")
            self._clean[key] = first
        return self._clean[key]

    def _finish(self, running: Running) -> Run:
        while (run := running.finished()) is None:
            time.sleep(0.002)
        shutil.rmtree(running.folder)
        return run

    def run(self, numbers: list[int], jobs: int, keep: bool = False) -> list[Case]:
        """Cases by their numbers, several at once."""
        cases, waiting, running = [], list(reversed(numbers)), []
        while waiting or running:
            while waiting and len(running) < jobs:
                number = waiting.pop()
                kind = kind_of(number)
                self.clean(kind)
                running.append(Running(self, kind, number))
            for one in list(running):
                run = one.finished()
                if run is not None:
                    running.remove(one)
                    cases.append(one.case(run, self.clean(one.kind)))
                    if not keep:
                        shutil.rmtree(one.folder)
                    if len(cases) % 50 == 0:
                        print(f"{len(cases)} of {len(numbers)} cases", file=sys.stderr, flush=True)
            time.sleep(0.002)
        self.require_untouched()
        return sorted(cases, key=lambda case: case.number)


def kind_of(number: int) -> Kind:
    """The kind of a case: they take turns."""
    return KINDS[number % len(KINDS)]


def import_everything() -> None:
    """What any command imports."""
    for module in pkgutil.walk_packages(cocomix.__path__, "cocomix."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("matplotlib.pyplot", "lm_eval.tasks", "lm_eval.models.huggingface", "transformers.models.gpt2"):
        with suppress(ImportError):  # without lm-evaluation-harness, its kind says so
            importlib.import_module(name)
    import_all()


def report(cases: list[Case]) -> str:
    """A Markdown table of outcomes by kind, and the bad ones one by one."""
    shown = [*GOOD, *BAD]
    rows = [["file -> command", "tried", *shown], ["---", *["---:"] * (1 + len(shown))]]
    for name in dict.fromkeys(kind.name for kind in KINDS):
        found = Counter(case.outcome for case in cases if case.kind == name)
        if found:
            rows.append([name, *(str(number or "") for number in (found.total(), *(found[one] for one in shown)))])
    found = Counter(case.outcome for case in cases)
    rows.append(["all", str(len(cases)), *(str(found[one] or "") for one in shown)])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for outcome in BAD:
        for case in sorted((case for case in cases if case.outcome == outcome), key=lambda case: case.kind):
            said = f": {case.last_line}" if case.last_line else ""
            lines.append(f"{outcome}: case {case.number}, {case.kind}: {case.file}: {case.damage}{said}")
    return "\n".join(lines)


def show(harness: Harness, number: int) -> list[Case]:
    """Run one case again, and show all that it has left."""
    cases = harness.run([number], 1, keep=True)
    folder = harness.folder / f"case-{number}"
    print(f"cocomix {' '.join(kind_of(number).command)}\nin {folder / 'world'}")
    for stream in ("stdout", "stderr"):
        print(f"--- {stream}\n{(folder / stream).read_text(errors='replace')}")
    for name, value in dataclasses.asdict(cases[0]).items():
        print(f"{name}: {value}")
    return cases


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cases", type=int, default=300, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", metavar="KIND", help="cases of kinds whose name holds this")
    parser.add_argument("--case", type=int, metavar="K", help="run this case alone, keep and show what it leaves")
    parser.add_argument("--jobs", type=int, default=2, metavar="J", help="cases at once (default: 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all cases to this file")
    parser.add_argument("--world", type=Path, metavar="FOLDER", help="take this world, and make it where it is not")
    return parser.parse_args(arguments)


def numbers_of(options: argparse.Namespace) -> list[int]:
    """The first so many numbers of cases of the kinds that are asked for."""
    rounds = range(options.cases * len(KINDS))
    found = (number for number in rounds if options.only in kind_of(number).name)
    numbers = [number for number, _ in zip(found, range(options.cases), strict=False)]
    if not numbers:
        raise SystemExit(f"--only {options.only}: known kinds: {', '.join(kind.name for kind in KINDS)}")
    return numbers


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 where an outcome is bad."""
    options = parse(arguments)
    numbers, began = numbers_of(options), time.monotonic()
    import_everything()
    folder = Path(tempfile.mkdtemp(prefix="corrupt_files-"))
    harness = Harness(folder, (options.world or folder / "world").absolute(), options.seed)
    if options.case is not None:
        cases = show(harness, options.case)
    else:
        cases = harness.run(numbers, options.jobs)
        shutil.rmtree(folder)
    print(report(cases))
    seconds = time.monotonic() - began
    bad = sum(case.outcome in BAD for case in cases)
    print(
        f"\n{len(cases)} cases (seed {options.seed}) in {seconds:.0f} s, {seconds / len(cases):.2f} s each: {bad} bad"
    )
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(case) for case in cases], indent=2) + "\n")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
