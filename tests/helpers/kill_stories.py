"""What is killed and started again: a story is one run, cache or file that must end like one that nobody killed."""

import json
import math
import os
import signal
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from forked_ranks import PATIENCE_S, Launch
from run_helpers import last_step
from safetensors import safe_open
from safetensors.numpy import load_file

from cocomix.distributed.checkpoint import checkpoints_folder, latest_checkpoint
from cocomix.teacher.label_cache import LabelCache

STEPS, SAVE_EVERY, GLOBAL_BATCH = 24, 4, 8
SETTINGS = [
    f"train.tokens={STEPS * GLOBAL_BATCH * 16}",
    f"train.save_every={SAVE_EVERY}",
    "train.eval_every=12",
    "train.eval_windows=8",
    "concept_labels.shard_windows=8",
]
LOGGED = ("loss", "ntp_loss", "concept_loss", "lr", "grad_norm", "perplexity")
SAVED_EXIT = 75
ROUNDING = 1e-5  # relative, of losses on other numbers of ranks


class Lost(Exception):
    """A kill has cost what it must not cost."""


def require(holds: bool, what: str) -> None:
    """Raise `Lost` unless `holds`."""
    if not holds:
        raise Lost(what)


@dataclass
class Kill:
    """When and how to kill: `moment` and `amount` say when (see the stories), `delay_s` how long after that."""

    moment: str
    amount: float
    delay_s: float
    signal: int
    victim: float | None  # which rank, as a share of them; None: all
    grace_s: float
    sync_s: float  # how slow the disk is meanwhile


@dataclass
class Counts:
    """What has happened so far; `of_story` counts a story's "kills", "starts" and "finished"."""

    moments: Counter[str] = field(default_factory=Counter)
    signals: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)  # of commands beside one another
    repeated: list[int] = field(default_factory=list)
    of_story: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by story

    @property
    def kills(self) -> int:
        """Of all stories."""
        return sum(count["kills"] for count in self.of_story.values())


class Story:
    """One run that is killed and started again until it is done; `folder` is what it writes."""

    name = ""

    def __init__(self, folder: Path, counts: Counts):
        self.folder, self.counts, self.log = folder, counts, folder.with_suffix(".log")

    def prepare(self) -> None:
        """Write what is there before the first start."""

    def arguments(self) -> list[str]:
        """The command line."""
        raise NotImplementedError

    def reached(self, kill: Kill, since: float) -> bool:
        """Whether the moment of the kill has come, `since` being when the ranks were started."""
        raise NotImplementedError

    def after_kill(self, launch: Launch, kill: Kill) -> str:
        """Check what there is, and return the moment at which the kill came."""
        raise NotImplementedError

    def when_done(self) -> None:
        """Check the finished run."""
        raise NotImplementedError

    def attempt(self, n_ranks: int, kill: Kill | None) -> bool:
        """Start it once more, kill it if told to; whether it is done."""
        launch, since = self.start(n_ranks, kill), time.monotonic()
        launch.wait(PATIENCE_S, lambda: launch.failed() or (kill is not None and self.reached(kill, since)))
        if kill is not None and self.strike(launch, kill):
            self.count_kill(launch, kill)
            return False
        self.require_end(launch)
        self.when_done()
        return True

    def start(self, n_ranks: int, kill: Kill | None, log: Path | None = None) -> Launch:
        """Start it, with as slow a disk as the kill says."""
        self.counts.of_story[self.name]["starts"] += 1
        return Launch(self.arguments(), n_ranks, log or self.log, kill.sync_s if kill else 0)

    def strike(self, launch: Launch, kill: Kill) -> bool:
        """Kill what still lives of a start that has not failed; whether there was anything to kill."""
        if launch.failed():
            return False
        time.sleep(kill.delay_s)
        living = launch.living()
        if not living:
            return False
        victims = living if kill.victim is None else [living[int(kill.victim * len(living))]]
        launch.send(kill.signal, victims)
        if kill.signal == signal.SIGTERM:  # then all should save and leave
            launch.wait(PATIENCE_S, lambda: any(code != SAVED_EXIT for code in launch.codes.values()))
        elif kill.victim is not None:
            time.sleep(kill.grace_s)  # until the launcher notices
        launch.end(kill.grace_s)
        return True

    def count_kill(self, launch: Launch, kill: Kill) -> None:
        """Check what there is after it, and count it."""
        self.counts.moments[self.after_kill(launch, kill)] += 1
        whom = "all ranks" if kill.victim is None else "one rank"
        self.counts.signals[f"{signal.Signals(kill.signal).name} to {whom}"] += 1
        self.counts.of_story[self.name]["kills"] += 1

    def require_end(self, launch: Launch) -> None:
        """Raise `Lost` unless all ranks have ended well."""
        failed, living = launch.failed(), launch.living()
        launch.end(0)
        require(not failed, f"{self.folder} ended with {launch.codes}; see {self.log}")
        require(not living, f"{self.folder} does not end; see {self.log}")


class Training(Story):
    """A training run, compared with one that nobody killed."""

    def __init__(
        self, name: str, config: Path, folder: Path, variant: list[str], reference: Path, counts: Counts, exact: bool
    ):
        super().__init__(folder, counts)
        self.name = name
        self._config, self._variant, self._exact = config, variant, exact
        self._expected, self._reference = records_of(reference), reference
        self._newest, self._lines, self._files, self._old_log = 0, {}, set(), None

    def arguments(self):
        return ["train", str(self._config), f"train.run={self.folder}", *SETTINGS, *self._variant, "--resume"]

    def reached(self, kill, since):
        if kill.moment == "start-up":
            return time.monotonic() - since >= kill.amount
        if kill.moment == "saving":  # so many files and folders have come
            return len(tree(checkpoints_folder(self.folder)) - self._files) >= kill.amount
        if kill.moment == "end" and kill.amount:  # the model is there, and no more
            return (self.folder / "model").exists()
        wanted = STEPS if kill.moment == "end" else self._newest + kill.amount
        return self._log_file() != self._old_log and last_step(self.folder) >= wanted

    def _log_file(self) -> int | None:
        """Which file metrics.jsonl is; a start that goes on makes a new one, without the lines that it repeats."""
        with suppress(FileNotFoundError):
            return (self.folder / "metrics.jsonl").stat().st_ino

    def after_kill(self, launch, kill):
        lines = records_of(self.folder)
        self._check_lines(lines)
        last = max((step for _, step in lines), default=0)
        checkpoint = latest_checkpoint(self.folder)
        newest = 0 if checkpoint is None else int(checkpoint.name.removeprefix("step-"))
        if checkpoint is not None:
            require_whole(checkpoint)
        require(newest >= self._newest, f"{self.folder}: the newest checkpoint was step {self._newest}, is {newest}")
        # A save that is being written holds up the next one, so the one before it is complete.
        require(
            last - newest <= 2 * SAVE_EVERY,
            f"{self.folder}: step {last} was logged, and {newest} is the newest complete checkpoint",
        )
        moment = self._moment(last, newest)
        if kill.signal == signal.SIGTERM and set(launch.codes.values()) == {SAVED_EXIT}:
            require(newest == last, f"{self.folder}: SIGTERM came at step {last} but step {newest} was saved")
        self.counts.repeated.append(last - newest)
        self._newest, self._lines, self._old_log = newest, lines, self._log_file()
        self._files = tree(checkpoints_folder(self.folder))
        return moment

    def _moment(self, last, newest):
        checkpoints = checkpoints_folder(self.folder)
        begun = any(path.name > f"step-{newest:08d}" for path in checkpoints.glob("step-*"))
        if begun and tree(checkpoints) != self._files:
            return "saving"
        if self._log_file() == self._old_log:
            return "start-up"
        return "end" if last == STEPS else "training"

    def _check_lines(self, lines):
        """Each is the reference's; those up to the checkpoint that it resumed from are still the same ones."""
        for key, line in lines.items():
            expected = self._expected.get(key, {})
            require(self._equal(line, expected), f"{self.folder}: {line} is not {expected}")
        steps = [step for kind, step in lines if kind == "train"]
        require(steps == list(range(1, len(steps) + 1)), f"{self.folder}: logged steps {steps}")
        for key, line in self._lines.items():
            if key[1] <= self._newest:
                require(
                    lines.get(key) == line,
                    f"{self.folder}: step {key[1]} came before the newest checkpoint, "
                    f"{self._newest}, and was repeated all the same, or its line is lost",
                )

    def _equal(self, line, expected):
        values = [(line.get(key), expected.get(key)) for key in LOGGED]
        if self._exact:
            return all(value == wanted for value, wanted in values)
        return all(value == wanted or math.isclose(value, wanted, rel_tol=ROUNDING) for value, wanted in values)

    def when_done(self):
        lines = records_of(self.folder)
        self._check_lines(lines)
        require(lines.keys() == self._expected.keys(), f"{self.folder}: metrics.jsonl has {sorted(lines)}")
        weights, expected = (load_file(run / "model" / "model.safetensors") for run in (self.folder, self._reference))
        require(weights.keys() == expected.keys(), f"{self.folder}: the model's weights have other names")
        for name, tensor in weights.items():
            same = (
                tensor.tobytes() == expected[name].tobytes()
                if self._exact
                else (abs(tensor - expected[name]).max() < 1e-4)
            )
            require(same, f"{self.folder}: {name} differs from the reference's")


class Labels(Story):
    """A label cache, compared with one that nobody killed."""

    name = "labels"

    def __init__(self, config: Path, folder: Path, reference: Path, counts: Counts):
        super().__init__(folder, counts)
        self._config, self._expected, self._files = config, contents(reference), set()

    def arguments(self):
        return ["labels", str(self._config), f"concept_labels.cache={self.folder}", *SETTINGS]

    def reached(self, kill, since):
        if kill.moment == "start-up":
            return time.monotonic() - since >= kill.amount
        return len(tree(self.folder) - self._files) >= kill.amount

    def after_kill(self, launch, kill):
        found = contents(self.folder)
        for name, content in found.items():
            require(content == self._expected[name], f"{self.folder}: {name} is not the reference's")
        if "meta.json" in found:
            missing = LabelCache.open(self.folder).n_missing()
            require(missing == len(self._expected) - len(found), f"{self.folder} lacks shards, but not {missing}")
        self._files = tree(self.folder)
        return "labels"

    def when_done(self):
        require(contents(self.folder) == self._expected, f"{self.folder} differs from the reference")
        LabelCache.open(self.folder).verify()


def tree(folder: Path) -> set[str]:
    """All files and folders below one, which may be changing."""
    return {os.path.join(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files)}


def contents(folder: Path) -> dict[str, bytes]:
    """Names and bytes of the files of a cache, but for what was left half-written."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*"))}


def records_of(run: Path) -> dict[tuple[str, int], dict]:
    """The lines of metrics.jsonl by kind and step; a last line that was cut off is left out."""
    lines = {}
    with suppress(FileNotFoundError):
        for text in (run / "metrics.jsonl").read_text().splitlines():
            with suppress(ValueError):
                line = json.loads(text)
                key = line["kind"], line["step"]
                require(key not in lines, f"{run}: {key} is logged twice")
                lines[key] = line
    return lines


def require_whole(checkpoint: Path) -> None:
    """Raise `Lost` unless every rank's file is there and can be opened, all of one save."""
    files = sorted((checkpoint / "state").glob("*.safetensors"))
    saves = set()
    for file in files:
        try:
            with safe_open(file, "np") as opened:
                saves.add(opened.metadata()["save_id"])
        except Exception as error:
            raise Lost(f"{file} cannot be opened: {error}") from error
    expected = int(files[0].stem.split("-")[-1]) if files else -1
    require(len(files) == expected, f"{checkpoint} has the files of {len(files)} ranks of {expected}")
    require(len(saves) == 1, f"{checkpoint} has files of {len(saves)} saves")
