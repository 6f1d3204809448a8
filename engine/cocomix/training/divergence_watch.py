"""Steps that are out of the ordinary, skipped or with a spike of the loss, what they read, and when it is too much."""

from dataclasses import dataclass

import numpy as np

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.data.token_files import TokenSplit
from cocomix.data.windows import WindowOrder, step_windows
from cocomix.training.interval import IntervalFigures
from cocomix.training.loss_watch import LossWatch


@dataclass(frozen=True)
class Event:
    """A step out of the ordinary: `kind` "spike" or "skipped", its loss (nats; need not be finite), the `windows` of
    its global batch, and these in words."""

    kind: str
    step: int
    loss: float
    windows: list[int]
    where: str


class DivergenceWatch:
    """Looks at every step of a run. `state` and `restore` carry what it knows over a resume."""

    def __init__(self, config: Config, split: TokenSplit):
        train = config.train
        self._folder, self._global_batch, self._max_skipped = (
            config.data.folder,
            train.global_batch,
            min(train.max_skipped_steps, config.total_steps),  # a run of which all steps are skipped has diverged too
        )
        self._order = WindowOrder(split.n_windows(config.data.seq_len), train.seed)
        self._losses = LossWatch(train.spike_deviations)
        self._skipped_in_a_row = 0

    def count(self, was_skipped: bool) -> None:
        """Count a step, right after it."""
        self._skipped_in_a_row = self._skipped_in_a_row + 1 if was_skipped else 0

    @property
    def has_diverged(self) -> bool:
        """Whether train.max_skipped_steps steps in a row, or all of a shorter run, were skipped."""
        return self._skipped_in_a_row >= self._max_skipped

    def require_no_divergence(self, step: int) -> None:
        """Raise `CocomixError` where training has diverged, of which `step` is the last step."""
        if self.has_diverged:
            raise CocomixError(
                f"training has diverged at step {step}: in {self._skipped_in_a_row} steps in a row the loss "
                f"or its gradient was not finite; the last one read {self._where(self._windows(step))}. Lower train.lr "
                "or raise train.warmup_steps, then resume from the last checkpoint"
            )

    def observe(self, figures: IntervalFigures, last_step: int) -> list[Event]:
        """Take the losses of an interval that ends with `last_step`; which of its steps were out of the ordinary."""
        events = []
        first_step = last_step - len(figures.losses) + 1
        for step, (losses, was_skipped) in enumerate(zip(figures.losses, figures.skipped, strict=True), first_step):
            loss = losses["loss"]
            if was_skipped:
                events.append(self._event("skipped", step, loss))
            elif self._losses.observe(loss):
                events.append(self._event("spike", step, loss))
        return events

    def _event(self, kind: str, step: int, loss: float) -> Event:
        windows = self._windows(step)
        return Event(kind, step, loss, windows.tolist(), self._where(windows))

    def _windows(self, step: int) -> np.ndarray:
        return step_windows(self._order, step - 1, self._global_batch)

    def _where(self, windows: np.ndarray) -> str:
        more = f" and {len(windows) - 4} more (all are in metrics.jsonl)" if len(windows) > 4 else ""
        return f"windows {', '.join(map(str, windows[:4]))}{more} of {self._folder}/train.bin"

    def state(self) -> dict:
        """JSON values that `restore` takes."""
        return {**self._losses.state(), "skipped_in_a_row": self._skipped_in_a_row}

    def restore(self, state: dict) -> None:
        """Go on where `state` was taken."""
        self._losses.restore(state)
        self._skipped_in_a_row = state["skipped_in_a_row"]
