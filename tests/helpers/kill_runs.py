"""Kills training runs and label extraction at random moments, starts them again, and checks that nothing was lost.

    python tests/helpers/kill_runs.py --kills 200 --ranks 4 --seed 0

Every line that a run logs must be that of a run that nobody killed, bit for bit, and so must its weights be in the
end; after each kill the newest complete checkpoint must be there and be the one that the next start goes on from; a
label cache must hold true shards alone at any time. With --elastic every start has another number of ranks, and
numbers may differ by rounding.

This process imports everything once and forks the ranks from itself: a start takes a second instead of eight. It
treats them as torchrun does: when one has died the others get SIGTERM and, a moment later, SIGKILL. Now and then their
disk is slow, so that files are long being written and several steps pass during a save.
"""

import argparse
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":  # before anything reads it: a process with threads must not fork
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from forked_ranks import PATIENCE_S, Launch, import_all, in_a_child
from run_helpers import labelled_world, last_step, stage
from safetensors import safe_open
from safetensors.numpy import load_file

from cocomix.distributed.checkpoint import checkpoints_folder, latest_checkpoint
from cocomix.teacher.label_cache import LabelCache

STEPS, SAVE_EVERY, GLOBAL_BATCH, ROUNDS = 24, 4, 8, 2
SETTINGS = [
    f"train.tokens={STEPS * GLOBAL_BATCH * 16}",
    f"train.save_every={SAVE_EVERY}",
    "train.eval_every=12",
    "train.eval_windows=8",
    "concept_labels.shard_windows=8",
]
LOGGED = ("loss", "ntp_loss", "concept_loss", "lr", "grad_norm", "perplexity")
MOST_KILLS = 8  # of one run, so that all kinds of runs have their turn
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
    """What has happened so far."""

    moments: Counter = field(default_factory=Counter)
    signals: Counter = field(default_factory=Counter)
    starts: Counter = field(default_factory=Counter)
    finished: Counter = field(default_factory=Counter)
    repeated: list[int] = field(default_factory=list)


class Story:
    """One run that is killed and started again until it is done; `folder` is what it writes."""

    name = ""

    def __init__(self, folder: Path, counts: Counts):
        self.folder, self.counts, self.log = folder, counts, folder.with_suffix(".log")

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
        self.counts.starts[self.name] += 1
        since = time.monotonic()
        launch = Launch(self.arguments(), n_ranks, self.log, kill.sync_s if kill else 0)
        launch.wait(PATIENCE_S, lambda: launch.failed() or (kill is not None and self.reached(kill, since)))
        if kill is not None and not launch.failed():
            time.sleep(kill.delay_s)
            if living := launch.living():
                victims = living if kill.victim is None else [living[int(kill.victim * len(living))]]
                self._strike(launch, kill, victims)
                return False
        failed, living = launch.failed(), launch.living()
        launch.end(0)
        require(not failed, f"{self.folder} ended with {launch.codes}; see {self.log}")
        require(not living, f"{self.folder} does not end; see {self.log}")
        self.when_done()
        self.counts.finished[self.name] += 1
        return True

    def _strike(self, launch: Launch, kill: Kill, victims: list[int]) -> None:
        launch.send(kill.signal, victims)
        if kill.signal == signal.SIGTERM:  # then all should save and leave
            launch.wait(PATIENCE_S, lambda: any(code != SAVED_EXIT for code in launch.codes.values()))
        elif kill.victim is not None:
            time.sleep(kill.grace_s)  # until the launcher notices
        launch.end(kill.grace_s)
        self.counts.moments[self.after_kill(launch, kill)] += 1
        whom = "all ranks" if kill.victim is None else "one rank"
        self.counts.signals[f"{signal.Signals(kill.signal).name} to {whom}"] += 1


class Training(Story):
    """A training run, compared with one that nobody killed."""

    name = "training runs"

    def __init__(self, config: Path, folder: Path, variant: list[str], reference: Path, counts: Counts, exact: bool):
        super().__init__(folder, counts)
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

    name = "label caches"

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


VARIANTS = {  # name: overrides; WORLD is the world's folder
    "ZeRO 0": [*stage(0), "concept_labels.cache=WORLD/labels"],
    "ZeRO 1, bf16": [*stage(1), "train.precision=bf16", "concept_labels.cache=WORLD/labels"],
    "ZeRO 2, online labels": stage(2),
    "ZeRO 3": [*stage(3), "concept_labels.cache=WORLD/labels"],
}


class Harness:
    """A world, runs in it that nobody kills, and stories told until there were enough kills."""

    def __init__(self, folder: Path, n_ranks: int, seed: int, elastic: bool):
        self._folder, self._n_ranks, self._elastic = folder, n_ranks, elastic
        self._draw, self.counts, self._told = random.Random(seed), Counts(), 0
        self._config = folder / "world" / "config.yaml"
        in_a_child(lambda: labelled_world(folder / "world"))
        self._start_s = 0.0  # from a start to the first step
        micro_batch = f"train.micro_batch={max(1, GLOBAL_BATCH // n_ranks // ROUNDS)}"
        self._variants = {
            name: [micro_batch, *(text.replace("WORLD", str(folder / "world")) for text in overrides)]
            for name, overrides in VARIANTS.items()
        }
        self._references = {}

    def _reference(self, name: str) -> Path:
        """What the story of a variant, or of "labels", must end like."""
        if name not in self._references:
            folder = self._folder / f"reference-{len(self._references)}"
            story = self._story(name, folder, folder)
            since, launch = time.monotonic(), Launch(story.arguments(), self._n_ranks, story.log)
            launch.wait(PATIENCE_S, lambda: launch.failed() or last_step(folder) > 0)
            self._start_s = max(self._start_s, time.monotonic() - since)
            launch.wait(PATIENCE_S, launch.failed)
            failed = launch.failed() or launch.living()
            launch.end(0)
            require(not failed, f"the reference {name} fails; see {story.log}")
            self._references[name] = folder
        return self._references[name]

    def _story(self, name: str, folder: Path, reference: Path) -> Story:
        if name == "labels":
            return Labels(self._config, folder, reference, self.counts)
        return Training(self._config, folder, self._variants[name], reference, self.counts, not self._elastic)

    def tell(self, name: str, most_kills: int) -> int:
        """Start one story, kill it at most so often, and see it through; the number of kills."""
        self._told += 1
        story = self._story(name, self._folder / f"story-{self._told:03d}", self._reference(name))
        kills = 0
        while not story.attempt(self._some_ranks(name), self._kill(name) if kills < most_kills else None):
            kills += 1
        shutil.rmtree(story.folder)
        story.log.unlink()
        return kills

    def _some_ranks(self, name: str) -> int:
        if name == "labels":  # it gives the same bytes on any number
            return self._draw.randint(1, self._n_ranks)
        divisors = [n for n in range(1, self._n_ranks + 1) if GLOBAL_BATCH % n == 0]
        return self._draw.choice(divisors) if self._elastic else self._n_ranks

    def _kill(self, name: str) -> Kill:
        draw = self._draw
        if name == "labels":
            moment = draw.choice(["start-up", "labels", "labels", "labels"])
        else:
            [moment] = draw.choices(["start-up", "training", "saving", "end"], [3, 4, 6, 1])
        amount = {
            "start-up": draw.uniform(0, self._start_s),
            "training": draw.randint(1, 3 * SAVE_EVERY),
            "saving": draw.randint(1, 40),
            "end": draw.randint(0, 1),
            "labels": draw.randint(1, 12),
        }[moment]
        return Kill(
            moment,
            amount,
            delay_s=draw.choice([0, draw.uniform(0, 0.003), draw.uniform(0, 0.1)]),
            signal=draw.choices([signal.SIGKILL, signal.SIGTERM], [4, 1])[0],
            victim=draw.choice([None, draw.random()]),
            grace_s=draw.choice([0, 0.2, 1.0]),
            sync_s=draw.choice([0, 0.01, 0.05]),
        )


def report(counts: Counts, options, seconds: float) -> str:
    """The figures, in words."""

    def listed(counter):
        return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))

    repeated = counts.repeated or [0]
    return "\n".join(
        [
            f"{sum(counts.moments.values())} kills on {'up to ' if options.elastic else ''}{options.ranks} ranks "
            f"(seed {options.seed}) in {seconds:.0f} s, nothing lost",
            f"  moments: {listed(counts.moments)}",
            f"  signals: {listed(counts.signals)}",
            f"  starts: {listed(counts.starts)}",
            f"  finished like those that nobody killed: {listed(counts.finished)}",
            f"  steps repeated after a kill: mean {sum(repeated) / len(repeated):.1f}, max {max(repeated)} "
            f"(a checkpoint every {SAVE_EVERY}; {sum(n > SAVE_EVERY for n in repeated)} times more, for a save that "
            "was being written)",
        ]
    )


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true", help="another number of ranks at every start")
    parser.add_argument("--folder", type=Path, help="a new folder that is kept (default: a temporary one)")
    options = parser.parse_args(arguments)
    import_all()
    folder, began, kills = options.folder or Path(tempfile.mkdtemp(prefix="kill_runs-")), time.monotonic(), 0
    harness = Harness(folder.absolute(), options.ranks, options.seed, options.elastic)
    first, second, *others = VARIANTS
    names = [first, second, "labels", *others, "labels"]
    most_kills = min(max(options.kills // len(names), 1), MOST_KILLS)
    try:
        while kills < options.kills:
            kills += harness.tell(names[0], min(options.kills - kills, most_kills))
            names.append(names.pop(0))
            print(f"{kills} kills, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    except Lost as lost:
        print(f"LOST after {sum(harness.counts.moments.values())} kills: {lost}", file=sys.stderr)
        return 1
    print(report(harness.counts, options, time.monotonic() - began))
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
