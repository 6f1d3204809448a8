"""When a run saves a checkpoint, and what happens where one could not be written."""

import copy
import sys
from pathlib import Path

from tqdm import tqdm

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError, NotFiniteError
from cocomix.core.files import atomic_folder
from cocomix.core.manifest import write_manifest
from cocomix.distributed.checkpoint import CheckpointWriter
from cocomix.distributed.ranks import Ranks
from cocomix.training.agreement import any_rank


class SavePolicy:
    """The saves of a run, written while training continues. All ranks call each method together.

    `saved_step` is the step of the newest checkpoint that is complete or being written, None where there is none.
    """

    def __init__(self, engine, config: Config, tokenizer, ranks: Ranks):
        self._engine, self._config, self._tokenizer, self._ranks = engine, config, tokenizer, ranks
        self._run = Path(config.train.run)
        self._writer = CheckpointWriter(self._run, config.train.keep_checkpoints, self._describe_model, ranks)
        self.saved_step: int | None = None

    def is_due(self, step: int, was_skipped: bool, stops: bool) -> bool:
        """Whether to save after `step`: where the run `stops`, at its end, and every train.save_every steps, but not
        while steps are being skipped."""
        if stops or step == self._config.total_steps:
            return True
        return step % self._config.train.save_every == 0 and not was_skipped

    def begin(self, step: int, trainer_state: dict) -> None:
        """Save `step`, once the last save is written. `trainer_state`: JSON values that a resumed run needs."""
        self.finish(step)
        self._writer.begin(self._engine, step, trainer_state)
        self.saved_step = step

    def notice_failure(self, step: int) -> None:
        """Treat a save that has failed like `finish` does, without waiting for one that is still being written."""
        if any_rank(self._writer.has_failed, self._ranks, step, self._config.train.log_every):
            self.finish(step)

    def finish(self, step: int) -> None:
        """Wait until the last save is written.

        Where it could not be, on any rank, raises `CocomixError`, or with train.continue_after_failed_save says so and
        continues, but not from weights that are not finite: training is at `step`.
        """
        try:
            self._writer.finish()
        except CocomixError as error:
            if isinstance(error, NotFiniteError) or not self._config.train.continue_after_failed_save:
                raise
            self.saved_step = None
            if self._ranks.is_first:
                tqdm.write(f"step {step}: a save failed; training continues without it: {error}", file=sys.stderr)

    def require_saved(self, step: int) -> None:
        """Raise `CocomixError` unless the newest checkpoint is that of `step`, the run's last one."""
        if self.saved_step != step:
            raise CocomixError(
                f"the last checkpoint of {self._run}, which its model comes from, could not be written: "
                "free some space and start again with --resume"
            )

    def _describe_model(self, folder: Path) -> None:
        """Write what a transformers folder has beside its weights."""
        model = self._engine.module
        with atomic_folder(folder) as aside:
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(aside)
            model.generation_config.save_pretrained(aside)
            self._tokenizer.save_pretrained(aside)
            write_manifest(aside)
