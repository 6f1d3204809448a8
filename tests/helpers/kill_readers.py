"""The story of a run that saves every step and keeps one checkpoint, while commands that read it come and go."""

import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from forked_ranks import PATIENCE_S, Launch, in_a_child
from kill_pairs import REFUSED_EXIT, said_in
from kill_stories import STEPS, Story, Training, require

from cocomix.cli import main as cocomix_main
from cocomix.distributed.checkpoint import checkpoints_folder

SAVES_ALL = ["train.save_every=1", f"train.keep_checkpoints={STEPS}"]
KEEPS_ONE = ["train.save_every=1", "train.keep_checkpoints=1"]
NOT_YET = ("holds no model", "has no evaluation yet", "is not a run folder")
READERS = {  # {run}: what is read, {out}: where to write
    "eval": ["eval", "{run}", "--windows", "4"],
    "generate": ["generate", "{run}", "--prompt", "the cat", "--max-new-tokens", "3"],
    "report": ["report", "{run}", "--out", "{out}"],
    "export": ["export", "{run}", "{out}"],
    "concepts": ["concepts", "{run}", "--concept", "7", "--corpus-tokens", "64", "--out", "{out}/page.html"],
}


class Readers(Story):
    """A run that is read while it trains, is killed and goes on: what is read is true of one of its checkpoints, or
    there is none yet. `truths` are the fingerprints of what each command finds in each checkpoint."""

    def __init__(self, name: str, run: Training, truths: dict[str, set[str]], draw: random.Random):
        super().__init__(run.folder, run.counts)
        self.name = run.name = name
        self._run, self._truths, self._draw, self._told = run, truths, draw, 0

    def arguments(self):
        return self._run.arguments()

    def attempt(self, n_ranks, kill):
        launch, since = self.start(n_ranks, kill), time.monotonic()
        deadline = since + PATIENCE_S

        def is_over() -> bool:
            return launch.failed() or not launch.living() or (kill is not None and self._run.reached(kill, since))

        while not is_over() and time.monotonic() < deadline:
            self._read(self._draw.choice(list(READERS)), is_over)
        if kill is not None and self._run.strike(launch, kill):
            self._run.count_kill(launch, kill)
            return False
        self.require_end(launch)
        self._run.when_done()
        for command in READERS:
            self._read(command, lambda: False)
        return True

    def _read(self, command: str, is_over: Callable[[], bool]) -> None:
        """Start a reader and judge what it says, unless the run ends meanwhile: then judge it all the same."""
        out, log = self.folder.with_suffix(".read"), self.folder.with_suffix(".reader.log")
        reader = Launch(reading(command, self.folder, out), 1, log)
        reader.wait(PATIENCE_S, is_over)
        reader.wait(PATIENCE_S)
        require(not reader.living(), f"{command} does not end; see {log}")
        said = said_in(log)
        errors = [line for line in said.splitlines() if "error:" in line]
        if reader.codes == {0: 0}:
            found = fingerprint(command, said, self.folder, out)
            require(found in self._truths[command], f"{command} read what is in no checkpoint; see {log} and {out}")
            outcome = "true"
        else:
            fits = reader.codes == {0: REFUSED_EXIT} and len(errors) == 1 and "Traceback" not in said
            fits = fits and errors[0].startswith(f"cocomix {command}: error: ") and any(n in errors[0] for n in NOT_YET)
            require(fits, f"{command} ended with {reader.codes} and {errors}; see {log}")
            outcome = "nothing yet"
        self.counts.outcomes[f"{command}: {outcome}"] += 1
        log.unlink()
        shutil.rmtree(out, ignore_errors=True)


def reading(command: str, run: Path, out: Path) -> list[str]:
    """The command line of a reader."""
    return [text.replace("{run}", str(run)).replace("{out}", str(out)) for text in READERS[command]]


def fingerprint(command: str, said: str, run: Path, out: Path) -> str:
    """What a reader has found, wherever the model lay; of a report, which tells times, only that it is there."""
    if command == "report":
        return "a page" if (out / "report.html").read_text().rstrip().endswith("</html>") else "half a page"
    digest = hashlib.sha256()
    if command in ("eval", "generate"):
        digest.update(said.replace(str(run), "RUN").encode())
    for path in sorted(out.rglob("*")) if out.exists() else ():
        digest.update(path.name.encode() + path.read_bytes().replace(str(run).encode(), b"RUN"))
    return digest.hexdigest()


def truths_of(run: Path, scratch: Path) -> dict[str, set[str]]:
    """What each reader finds in the checkpoints of a finished run and in its model."""
    scratch.mkdir()
    found = {command: {"a page"} if command == "report" else set() for command in READERS}
    models = [*sorted(checkpoints_folder(run).glob("step-*")), run / "model"]

    def read_all() -> None:
        for number, model in enumerate(models):
            for command in READERS.keys() - {"report"}:
                log = os.open(scratch / f"{command}-{number}.log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                out = scratch / f"{command}-{number}"
                if cocomix_main(reading(command, model, out)):
                    raise RuntimeError(f"{command} {model} fails")

    in_a_child(read_all)
    for number, model in enumerate(models):
        for command in READERS.keys() - {"report"}:
            said = (scratch / f"{command}-{number}.log").read_text()
            found[command].add(fingerprint(command, said, model, scratch / f"{command}-{number}"))
    return found
