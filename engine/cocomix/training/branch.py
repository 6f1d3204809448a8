"""Beginning a run with a checkpoint of another one, so that one long run serves many budgets.

With train.schedule=wsd a run's learning rate does not depend on its length until it decays. So a run of N tokens may
begin with the newest checkpoint of a longer run that lies before its own decay, and ends as if it had trained alone.
A run with concepts may also begin with one of next-token prediction: it takes over weights and optimizer state and adds
concept layers, new ones with moments of zero.
"""

import math
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

from cocomix.core.config import Config, TrainConfig
from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_write
from cocomix.core.flops import sae_flops
from cocomix.core.shapes import TeacherShape
from cocomix.distributed.checkpoint import complete_checkpoints, latest_checkpoint, read_trainer_state
from cocomix.training.metrics import FILE_NAME
from cocomix.training.resume import settings
from cocomix.training.run_record import RunRecord
from cocomix.training.schedule import learning_rate_factor


def branch_point(source: Path, config: Config) -> Path:
    """The newest checkpoint of the run in `source` all of whose steps had the learning rates of a run of `config`.

    Raises `CocomixError` where there is none.
    """
    checkpoints = complete_checkpoints(source)
    if not checkpoints:
        raise CocomixError(f"{source} has no complete checkpoint to begin with: name the folder of a run, train.run")
    for checkpoint in checkpoints:
        state = read_trainer_state(checkpoint)
        if _rates_agree(state["identity"], config, state["step"]):
            return checkpoint
    raise CocomixError(
        f"no checkpoint of {source} (the oldest is {checkpoints[-1].name}) was reached by the learning rates of this "
        "run: train the other one with train.schedule=wsd or constant, and with a train.keep_checkpoints that keeps a "
        "step before this run's decay"
    )


def _rates_agree(stored: dict[str, Any], config: Config, steps: int) -> bool:
    """Whether the run that `stored` its settings had the rates of `config` in its first `steps` steps."""
    known = {**settings(Config()), **stored}
    before = TrainConfig(**{field.name: known[f"train.{field.name}"] for field in fields(TrainConfig)})
    total = math.ceil(before.tokens / (before.global_batch * known["data.seq_len"]))
    if steps >= config.total_steps:
        return False
    own, other = learning_rate_factor(config.train, config.total_steps), learning_rate_factor(before, total)
    return all(config.train.lr * own(step) == before.lr * other(step) for step in range(steps))


def require_source(config: Config, source: Path | None, recorded: str | None) -> None:
    """Raise `CocomixError` where the config's run would begin with itself, or did not begin with `source` (None: not
    said). `recorded` is the run that its own record says it began with."""
    run = Path(config.train.run)
    if source is not None and source.resolve() == run.resolve():
        raise CocomixError(f"{run} cannot begin with a checkpoint of its own: set another train.run")
    if recorded is None:
        if source is not None and latest_checkpoint(run) is not None:
            raise CocomixError(f"{run} did not begin with a checkpoint of {source}: leave --branch-from out")
    elif source is None and latest_checkpoint(run) is None:
        raise CocomixError(f"{run} began with a checkpoint of {recorded}: pass --branch-from {recorded} again")
    elif source is not None and Path(recorded).resolve() != source.resolve():
        raise CocomixError(f"{run} began with a checkpoint of {recorded}, not of {source}: set another train.run")


def cost_until(
    source: Path, tokens: int, config: Config, teacher: TeacherShape | None
) -> tuple[tuple[float, float], ...] | None:
    """What the run in `source` had cost after `tokens`, see `RunRecord.cost`; with the training of its SAE where the
    config's run teaches itself from there on. None where the other run does not tell."""
    record = RunRecord.read(source)
    corners = record.cost(tokens)
    if corners is None:
        return None
    if config.teacher.self_taught_after and record.method == "none" and teacher is not None:
        of_sae = config.sae.tokens * sae_flops(teacher, config.sae.k, config.data.seq_len)
        corners.append((tokens, corners[-1][1] + of_sae))
    return tuple(corners)


def take_metrics(source: Path, run: Path) -> None:
    """Let the run begin with the figures of the other one, whose later lines are dropped when the run opens them."""
    if (source / FILE_NAME).is_file():
        with open(source / FILE_NAME, "rb") as lines, atomic_write(run / FILE_NAME) as copy:
            shutil.copyfileobj(lines, copy)
