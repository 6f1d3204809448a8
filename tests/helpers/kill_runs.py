"""Kills the program at random moments, starts it again, and checks that nothing was lost.

    python tests/helpers/kill_runs.py --kills 200 --ranks 4 --seed 0

Stories are told in an order that the seed draws, all of them in each round. Training runs: every line that a run logs
must be that of a run that nobody killed, bit for bit, and so must its weights be in the end; after each kill the newest
complete checkpoint must be there and be the one that the next start goes on from. Label caches hold true shards alone
at any time. Token files, SAEs, exports, reports and pages of concepts are absent or whole, end like those that nobody
killed, and nothing half-written stays. Of two that write one place at a time, one does the work. Commands that read a
run while it trains find what is in one of its checkpoints, or say in one line that there is none yet. With --elastic
every start of a training has another number of ranks, and its numbers may differ by rounding.

This process imports everything once and forks the ranks from itself: a start takes a second instead of eight. It
treats them as torchrun does: when one has died the others get SIGTERM and, a moment later, SIGKILL. Now and then their
disk is slow, so that files are long being written and several steps pass during a save.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":  # before anything reads it: a process with threads must not fork
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

from forked_ranks import PATIENCE_S, Launch, import_all, in_a_child
from kill_commands import OUT, Data, Export, Page, Sae
from kill_pairs import Pair
from kill_readers import KEEPS_ONE, SAVES_ALL, Readers, truths_of
from kill_stories import GLOBAL_BATCH, SAVE_EVERY, Counts, Kill, Labels, Lost, Story, Training, require
from run_helpers import labelled_world, last_step, stage

from cocomix.core.files import write_json
from cocomix.core.machine import commit
from cocomix.distributed.checkpoint import latest_checkpoint
from cocomix.teacher import sae_training

ROUNDS = 2
MOST_KILLS = 8  # of one story at a time, so that all have their turn
STATE_SECONDS = 0.05  # between two saves of an SAE's training

VARIANTS = {  # of training: overrides; WORLD is the world's folder
    "train, ZeRO 0": [*stage(0), "concept_labels.cache=WORLD/labels"],
    "train, ZeRO 1, bf16": [*stage(1), "train.precision=bf16", "concept_labels.cache=WORLD/labels"],
    "train, ZeRO 2, online labels": stage(2),
    "train, ZeRO 3": [*stage(3), "concept_labels.cache=WORLD/labels"],
}
FIRST = next(iter(VARIANTS))
PAIRS = {"two train": FIRST, "two labels": "labels", "two data": "data", "two sae": "sae"}
READ = "readers of a living run"
COMMANDS = {  # in one process: what tells their stories, and the command line
    "data": (Data, ["data", "CONFIG", "data.folder={out}"]),
    "sae": (Sae, ["sae", "CONFIG", "teacher.sae={out}", "sae.tokens=16384"]),
    "export": (Export, ["export", "CHECKPOINT", "{out}"]),
    "report": (Page, ["report", "RUN", "--out", "{out}"]),
    "concepts": (
        Page,
        ["concepts", "RUN", "--text", "the lazy dog sleeps", "--corpus-tokens", "320", "--out", "{out}"],
    ),
}
OLDER = {"report": ["report", "RUN", "RUN2", "--out", "{out}"], "concepts": ["concepts", "RUN2", "--concept", "7"]}
STORIES = [*VARIANTS, "labels", *COMMANDS, *PAIRS, READ]


class Harness:
    """A world, runs in it that nobody kills, and stories told until there were enough kills."""

    def __init__(self, folder: Path, n_ranks: int, seed: int, elastic: bool):
        self._folder, self._n_ranks, self._elastic = folder, n_ranks, elastic
        self._draw, self.counts, self._told = random.Random(seed), Counts(), 0
        self._config = folder / "world" / "config.yaml"
        in_a_child(lambda: labelled_world(folder / "world"))
        self._start_s = 0.0  # from a start to the first step
        self._seconds: dict[str, float] = {}  # of a story that nobody kills
        self._micro_batch = f"train.micro_batch={max(1, GLOBAL_BATCH // n_ranks // ROUNDS)}"
        self._references: dict[str, Path] = {}
        self._truths: dict[str, set[str]] = {}

    def _reference(self, name: str) -> Path:
        """What the story of this name must end like."""
        name = PAIRS.get(name, name)
        if name not in self._references:
            folder = self._folder / f"reference-{len(self._references)}"
            self._references[name] = folder  # where its story looks for what to expect
            if name in COMMANDS:
                folder.mkdir()
            self._tell_undisturbed(self._single(name, name, folder, folder, SAVES_ALL), folder, name)
            if name == READ:
                self._truths = truths_of(folder, self._folder / "truths")
        return self._references[name]

    def _tell_undisturbed(self, story: Story, folder: Path, name: str) -> None:
        since, launch = time.monotonic(), Launch(story.arguments(), self._ranks(name), story.log)
        if name not in COMMANDS:
            launch.wait(PATIENCE_S, lambda: launch.failed() or last_step(folder) > 0)
            self._start_s = max(self._start_s, time.monotonic() - since)
        launch.wait(PATIENCE_S, launch.failed)
        story.require_end(launch)
        self._seconds[name] = time.monotonic() - since

    def _story(self, name: str, folder: Path) -> Story:
        reference = self._reference(name)
        story = self._single(name, PAIRS.get(name, name), folder, reference, KEEPS_ONE)
        if name in PAIRS:
            longest = self._draw.choice([0, 0.05, self._seconds[PAIRS[name]]])
            return Pair(name, story, name == "two labels", lambda: self._draw.uniform(0, longest))
        if isinstance(story, Training) and name == READ:
            return Readers(name, story, self._truths, self._draw)
        return story

    def _single(self, name: str, kind: str, folder: Path, reference: Path, saves: list[str]) -> Story:
        """A story of one command at a time."""
        if kind == "labels":
            return Labels(self._config, folder, reference, self.counts)
        if kind in COMMANDS:
            make, command = COMMANDS[kind]
            older = [self._older(kind)] if make is Page else []
            return make(name, folder, self._filled_in(command), reference, self.counts, *older)
        variant = VARIANTS[FIRST if kind == READ else kind]
        settings = [self._micro_batch, *self._filled_in(variant), *(saves if kind == READ else [])]
        exact = not self._elastic or kind == READ
        return Training(name, self._config, folder, settings, reference, self.counts, exact)

    def _filled_in(self, arguments: list[str]) -> list[str]:
        """Arguments with the paths of the world and of finished runs."""

        def filled_in(text: str) -> str:
            if text == "CONFIG":
                return str(self._config)
            if text in ("RUN", "RUN2"):
                return str(self._reference(list(VARIANTS)[text == "RUN2"]))
            if text == "CHECKPOINT":
                return str(latest_checkpoint(self._reference(FIRST)))
            return text.replace("WORLD", str(self._folder / "world"))

        return [filled_in(text) for text in arguments]

    def _older(self, name: str) -> Path | None:
        """A folder with what an earlier start of a command has left, or None."""
        if self._draw.random() < 0.5:
            return None
        folder = self._folder / f"older-{name}"
        if not folder.exists():
            folder.mkdir()
            more = [] if "{out}" in OLDER[name] else ["--corpus-tokens", "64", "--out", "{out}"]
            arguments = [text.replace("{out}", str(folder / OUT)) for text in self._filled_in([*OLDER[name], *more])]
            launch = Launch(arguments, 1, folder.with_suffix(".log"))
            launch.wait(PATIENCE_S)
            require(launch.codes == {0: 0}, f"{arguments} fails; see {folder}.log")
        return folder

    def tell(self, name: str, most_kills: int) -> None:
        """Start one story, kill it at most so often, and see it through."""
        self._told += 1
        story = self._story(name, self._folder / f"story-{self._told:03d}")
        count, since = self.counts.of_story[name], time.monotonic()
        before = count["kills"]
        story.prepare()
        while not story.attempt(self._ranks(name), self._kill(name) if count["kills"] - before < most_kills else None):
            pass
        count["finished"] += 1
        self.counts.seconds[name] += time.monotonic() - since
        shutil.rmtree(story.folder)
        story.log.unlink()

    def _ranks(self, name: str) -> int:
        kind = PAIRS.get(name, name)
        if kind in COMMANDS:
            return 1
        if kind == "labels":  # it gives the same bytes on any number
            return self._draw.randint(1, self._n_ranks)
        divisors = [n for n in range(1, self._n_ranks + 1) if GLOBAL_BATCH % n == 0]
        return self._draw.choice(divisors) if self._elastic and name != READ else self._n_ranks

    def _kill(self, name: str) -> Kill:
        draw, kind = self._draw, PAIRS.get(name, name)
        if kind in COMMANDS:
            moment = draw.choice(["time", "files", "files"])
        elif kind == "labels":
            moment = draw.choice(["start-up", "labels", "labels", "labels"])
        else:
            [moment] = draw.choices(["start-up", "training", "saving", "end"], [3, 4, 6, 1])
        amount = {
            "time": draw.uniform(0, self._seconds[kind]),
            "files": draw.randint(1, 6),
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
            victim=None if kind in COMMANDS else draw.choice([None, draw.random()]),
            grace_s=draw.choice([0, 0.2, 1.0]),
            sync_s=draw.choice([0, 0.01, 0.05]),
        )


def report(counts: Counts, options, seconds: float) -> str:
    """The figures, in words."""

    def listed(counter):
        return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))

    repeated = counts.repeated or [0]
    rows = [
        f"  {name}: {count['kills']} kills, {count['starts']} starts, {count['finished']} finished like those that "
        f"nobody killed, {counts.seconds[name]:.0f} s, {counts.seconds[name] / max(count['kills'], 1):.2f} s a kill"
        for name, count in sorted(counts.of_story.items())
    ]
    return "\n".join(
        [
            f"{counts.kills} kills on {'up to ' if options.elastic else ''}{options.ranks} ranks "
            f"(seed {options.seed}) in {seconds:.0f} s, nothing lost",
            *rows,
            f"  moments: {listed(counts.moments)}",
            f"  signals: {listed(counts.signals)}",
            f"  beside one another: {listed(counts.outcomes)}",
            f"  steps repeated after a kill: mean {sum(repeated) / len(repeated):.1f}, max {max(repeated)} "
            f"(a checkpoint every {SAVE_EVERY}; {sum(n > SAVE_EVERY for n in repeated)} times more, for a save that "
            "was being written)",
        ]
    )


def figures(counts: Counts, options, seconds: float, lost: str | None) -> dict:
    """The figures, as JSON values."""
    return {
        "kind": "kills",
        "commit": commit(),
        "kills": counts.kills,
        "ranks": options.ranks,
        "elastic": options.elastic,
        "seed": options.seed,
        "seconds": round(seconds, 1),
        "lost": lost,
        "stories": {
            name: {**count, "seconds": round(counts.seconds[name], 1)}
            for name, count in sorted(counts.of_story.items())
        },
        "moments": dict(sorted(counts.moments.items())),
        "signals": dict(sorted(counts.signals.items())),
        "beside_one_another": dict(sorted(counts.outcomes.items())),
        "repeated_steps": counts.repeated,
    }


def tell_all(harness: Harness, names: list[str], kills: int, draw: random.Random) -> None:
    """Tell the stories in rounds of another order each, once at least and until there were so many kills."""
    most_kills = min(max(kills // len(names), 1), MOST_KILLS)
    began, counts, first = time.monotonic(), harness.counts, True
    while first or counts.kills < kills:
        for name in draw.sample(names, len(names)):
            if first or counts.kills < kills:
                harness.tell(name, min(max(kills - counts.kills, 0), most_kills))
                print(f"{counts.kills} kills, {time.monotonic() - began:.0f} s: {name}", file=sys.stderr, flush=True)
        first = False


def main(arguments: list[str] | None = None) -> int:
    """Run it; 1 where something was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--elastic", action="store_true", help="another number of ranks at every start")
    parser.add_argument("--only", action="append", choices=STORIES, metavar="STORY", help=", ".join(STORIES))
    parser.add_argument("--folder", type=Path, help="a new folder that is kept (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to this file too")
    options = parser.parse_args(arguments)
    import_all()
    sae_training.STATE_SECONDS = STATE_SECONDS
    folder, began, lost = options.folder or Path(tempfile.mkdtemp(prefix="kill_runs-")), time.monotonic(), None
    harness = Harness(folder.absolute(), options.ranks, options.seed, options.elastic)
    try:
        tell_all(harness, options.only or STORIES, options.kills, random.Random(options.seed))
    except Lost as error:
        lost = str(error)
    seconds = time.monotonic() - began
    if options.json is not None:
        write_json(options.json, figures(harness.counts, options, seconds, lost))
    if lost is not None:
        print(f"LOST after {harness.counts.kills} kills: {lost}", file=sys.stderr)
        return 1
    print(report(harness.counts, options, seconds))
    if options.folder is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
