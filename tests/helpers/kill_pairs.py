"""Stories in which the same command is started twice at a time, and perhaps one of the two killed."""

import time
from pathlib import Path

from forked_ranks import PATIENCE_S, Launch
from kill_stories import Kill, Story, require

REFUSED_EXIT = 2


class Pair(Story):
    """Two starts of a story's command beside each other: one does the work and the other is refused in one line, or
    finds it done, or (`shares`) does its part. `gap_s` draws how much later the second one starts."""

    def __init__(self, name: str, single: Story, shares: bool, gap_s):
        super().__init__(single.folder, single.counts)
        self.name = single.name = name
        self._single, self._shares, self._gap_s = single, shares, gap_s

    def prepare(self):
        self._single.prepare()

    def arguments(self):
        return self._single.arguments()

    def attempt(self, n_ranks, kill):
        since = time.monotonic()
        logs = [self.log, self.log.with_suffix(".second.log")]
        begun = [len(said_in(log)) for log in logs]
        launches = [self.start(n_ranks, kill, logs[0])]
        time.sleep(self._gap_s())
        launches.append(self.start(n_ranks, None, logs[1]))
        victim = None if kill is None else self._strike_one(launches, kill, since)
        for launch in launches:
            launch.wait(PATIENCE_S, launch.failed)
            require(launch.failed() or not launch.living(), f"{self.folder} does not end; see {self.log}")
            launch.wait(1)  # the other ranks of one that was refused say so too
            launch.end(1)
        outcomes = [
            "killed" if launch is victim else self._outcome(launch, said_in(log)[start:])
            for launch, log, start in zip(launches, logs, begun, strict=True)
        ]
        self.counts.outcomes[f"{self.name}: {' and '.join(sorted(outcomes))}"] += 1
        if victim is not None and kill is not None:
            self._single.count_kill(victim, kill)
        require(victim is not None or "done" in outcomes, f"{self.folder}: neither has done it; see {self.log}")
        if victim is not None and (self._shares or "done" not in outcomes):
            return False
        self._single.when_done()
        logs[1].unlink(missing_ok=True)  # it may have been killed before it wrote
        return True

    def _strike_one(self, launches: list[Launch], kill: Kill, since: float) -> Launch | None:
        """Kill the first or the second, by `kill.amount`; the one that was killed, None where it had ended."""
        victim = launches[int(kill.amount * 1000) % 2]
        victim.wait(PATIENCE_S, lambda: self._single.reached(kill, since))
        return victim if self.strike(victim, kill) else None

    def _outcome(self, launch: Launch, said: str) -> str:
        """What has become of one that was left alone."""
        codes = set(launch.codes.values())
        if codes == {0}:
            return "done"
        errors = [line for line in said.splitlines() if "error:" in line]
        fits = codes == {REFUSED_EXIT} and len(errors) == len(launch.codes) and not self._shares
        fits = fits and all("is being written by cocomix" in line for line in errors) and "Traceback" not in said
        require(fits, f"{self.folder}: of two, one ended with {launch.codes} and {errors}; see {self.log}")
        return "refused"


def said_in(log: Path) -> str:
    """What commands have written to a log."""
    return log.read_text(errors="replace") if log.exists() else ""
