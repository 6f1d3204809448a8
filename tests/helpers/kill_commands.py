"""Stories of commands in one process that leave a folder or a file: token files, SAEs, exports, reports and pages."""

import re
import shutil
import time
from pathlib import Path

from kill_stories import Counts, Story, require, tree

from cocomix.data.token_files import SPLITS, TokenFiles
from cocomix.teacher.sae import SparseAutoencoder

STOPPED_EXIT = 130
OUT = "out"  # in the folder of a story: what its command writes


class Written(Story):
    """One command that writes `OUT`, compared bit for bit with what nobody killed. `command` has {out} in its place."""

    leaves_lock = False  # a finished command's next start need not take the lock that a killed one left

    def __init__(self, name: str, folder: Path, command: list[str], reference: Path, counts: Counts):
        super().__init__(folder, counts)
        self.name, self._command = name, command
        self._expected, self._files, self._left = files_of(reference), set(), set()

    def prepare(self):
        self.folder.mkdir()

    def arguments(self):
        return [text.replace("{out}", str(self.folder / OUT)) for text in self._command]

    def reached(self, kill, since):
        if kill.moment == "time":
            return time.monotonic() - since >= kill.amount
        return len(tree(self.folder) - self._files) >= kill.amount  # so many files and folders have come

    def after_kill(self, launch, kill):
        left = set(leftovers(self.folder))
        if set(launch.codes.values()) == {STOPPED_EXIT}:
            require(left <= self._left, f"{self.folder} was told to stop, did so, and left {left - self._left}")
        self.check_files(files_of(self.folder))
        found = tree(self.folder)
        moment = f"{self.name}: {'half-written' if left else 'written' if found - self._files else 'start-up'}"
        self._files, self._left = found, left
        return moment

    def check_files(self, found: dict[str, bytes]) -> None:
        """Raise `Lost` unless each file is as nobody killed it, or as it was before."""
        raise NotImplementedError

    def when_done(self):
        require(files_of(self.folder) == self._expected, f"{self.folder} differs from the reference")
        left = leftovers(self.folder, locks=not self.leaves_lock)
        require(not left, f"{self.folder}: {left} stay behind")


class Data(Written):
    """Token files: without meta.json, or complete."""

    leaves_lock = True

    def check_files(self, found):
        if f"{OUT}/meta.json" not in found:
            return
        require(found == self._expected, f"{self.folder} has its meta.json and is not the reference")
        for name in SPLITS:
            TokenFiles.open(self.folder / OUT).split(name).verify()


class Sae(Written):
    """An SAE: absent or whole, with the state of its training beside it meanwhile."""

    _step, _length = 0, 0

    def check_files(self, found):
        """The state counts too: each start goes on from it, at no earlier step than the one before it did."""
        self._check_step()
        if (self.folder / OUT).exists():
            found.pop(f"{OUT}.partial.pt", None)
            require(found == self._expected, f"{self.folder} holds an SAE that is not the reference's")
            SparseAutoencoder.load(self.folder / OUT)

    def when_done(self):
        self._check_step()
        super().when_done()

    def _check_step(self):
        said = self.log.read_text(errors="replace")[self._length :]
        for step in map(int, re.findall(r"going on from \S+ at step (\d+)", said)):
            require(step >= self._step, f"{self.folder} had come to step {self._step} and went on from {step}")
            self._step = step
        require("starting afresh" not in said, f"{self.folder} starts afresh; see {self.log}")
        self._length += len(said)


class Export(Written):
    """An exported model: absent or whole. One that is there is taken away, for no start would touch it."""

    def check_files(self, found):
        if (self.folder / OUT).exists():
            require(found == self._expected, f"{self.folder} holds an export that is not the reference")
            shutil.rmtree(self.folder / OUT)


class Page(Written):
    """A report or a page of concepts: every file is absent, an `older` one or the new one."""

    def __init__(
        self, name: str, folder: Path, command: list[str], reference: Path, counts: Counts, older: Path | None
    ):
        super().__init__(name, folder, command, reference, counts)
        self._older = older

    def prepare(self):
        if self._older is None:
            super().prepare()
        else:
            shutil.copytree(self._older, self.folder)

    def check_files(self, found):
        before = {} if self._older is None else files_of(self._older)
        for name, content in found.items():
            require(
                content in (before.get(name), self._expected.get(name)),
                f"{self.folder}: {name} is neither the older one nor the new one",
            )
        lost = before.keys() & self._expected.keys() - found.keys()
        require(not lost, f"{self.folder} had {lost}")


def files_of(folder: Path) -> dict[str, bytes]:
    """Names and bytes of all files below a folder, but for what is half-written and locks."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def leftovers(folder: Path, locks: bool = False) -> list[str]:
    """Names of what lies half-written below a folder, and of locks."""
    names = sorted(path.name for path in folder.rglob(".*"))
    return [name for name in names if locks or not name.endswith(".lock")]
