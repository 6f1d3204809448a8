"""What a run says while it trains: the lines of metrics.jsonl, the progress bar, and steps out of the ordinary."""

import math
import statistics
import sys
from pathlib import Path

from tqdm import tqdm

from cocomix.core.config import Config
from cocomix.distributed.ranks import Ranks
from cocomix.training.divergence_watch import Event
from cocomix.training.interval import IntervalFigures
from cocomix.training.metrics import MetricsLog, peak_memory_gib, progress_bar
from cocomix.training.run_record import RunRecord
from cocomix.training.train_step import TrainStep
from cocomix.training.validation import Evaluation

_IN_WORDS = {"spike": "loss spike", "skipped": "skipped: the loss or its gradient is not finite"}


class RunLog:
    """Writes and shows on the first rank alone. `elapsed_s`: seconds of training so far, resumed parts included; `bar`:
    the progress bar.

    Opening it writes run.json and drops the lines after `from_step`, which a resumed run writes again.
    """

    def __init__(self, record: RunRecord, config: Config, ranks: Ranks, from_step: int, elapsed_s: float):
        self._tokens_per_step, self._device = record.tokens_per_step, ranks.device
        self.elapsed_s = elapsed_s
        self._metrics = None
        if ranks.is_first:
            run = Path(config.train.run)
            record.write(run)
            self._metrics = MetricsLog(run, config.train, from_step, record.as_json())
        self.bar = progress_bar(record.name, record.total_steps, from_step, ranks.is_first)

    @property
    def n_lines(self) -> int:
        """Lines of metrics.jsonl; 0 on all ranks but the first."""
        return 0 if self._metrics is None else self._metrics.n_lines

    def require_lines(self, n_lines: int) -> None:
        """Say on standard error where metrics.jsonl lacks some of the `n_lines` lines that it once had."""
        if self.n_lines < n_lines and self._metrics is not None:
            tqdm.write(
                f"metrics.jsonl lacks {n_lines - self.n_lines} of the {n_lines} lines of before: its figures have gaps",
                file=sys.stderr,
            )

    def training(self, step: int, figures: IntervalFigures, train_step: TrainStep) -> None:
        """Write the line of an interval that ends with `step`, unless all of its steps were skipped."""
        self.elapsed_s += figures.seconds
        losses = figures.mean_losses()
        if self._metrics is None or not losses:
            return
        tokens_per_s = self._tokens_per_step / figures.step_time_s
        self._metrics.write(
            "train",
            step,
            step * self._tokens_per_step,
            **losses,
            **({} if "concept_loss" in losses else {"concept_loss": None}),
            lr=train_step.lr,
            grad_norm=float(train_step.grad_norm),
            skipped_steps=train_step.engine.skipped_steps,
            step_time_s=figures.step_time_s,
            tokens_per_s=tokens_per_s,
            peak_memory_gib=peak_memory_gib(self._device),
            elapsed_s=self.elapsed_s,
        )
        self.bar.set_postfix_str(f"loss {losses['loss']:.3f}, {tokens_per_s:,.0f} tok/s", refresh=False)

    def events(self, events: list[Event]) -> None:
        """Write a line for each step that was out of the ordinary, and say so on standard error."""
        if self._metrics is None:
            return
        for event in events:
            tqdm.write(
                f"step {event.step}: {_IN_WORDS[event.kind]} (loss {event.loss:.4g}); it read {event.where}",
                file=sys.stderr,
            )
            self._metrics.event(
                event.kind,
                event.step,
                event.step * self._tokens_per_step,
                loss=event.loss if math.isfinite(event.loss) else None,
                windows=event.windows,
            )

    def evaluation(self, step: int, found: Evaluation) -> None:
        """Write the line of an evaluation, once a step: a run that was killed at its end evaluates again."""
        if self._metrics is None or self._metrics.has_evaluation(step):
            return
        self._metrics.write(
            "eval",
            step,
            step * self._tokens_per_step,
            loss=found.loss,
            perplexity=found.perplexity,
            elapsed_s=self.elapsed_s,
            **found.concepts,
        )

    def summary(self, step: int, found: Evaluation) -> None:
        """Write the line of a finished run: its last evaluation and typical speed, resumed parts included."""
        if self._metrics is None:
            return
        times = sorted(self._metrics.step_times[1:] or self._metrics.step_times)  # the first holds start-up costs
        if not times:
            tqdm.write("metrics.jsonl has lost its training lines: there is no summary of them", file=sys.stderr)
            return
        median = statistics.median(times)
        self._metrics.write(
            "summary",
            step,
            step * self._tokens_per_step,
            perplexity=found.perplexity,
            loss=found.loss,
            tokens_per_s=self._tokens_per_step / median,
            step_time_s=median,
            step_time_p10_s=times[len(times) // 10],
            step_time_p90_s=times[-1 - len(times) // 10],
            peak_memory_gib=self._metrics.peak_memory_gib,
            elapsed_s=self.elapsed_s,
        )

    def close(self) -> None:
        """Flush and close the files."""
        if self._metrics is not None:
            self._metrics.close()
