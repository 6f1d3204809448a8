"""A student that is its own teacher: next-token prediction for the first tokens, then its state at that point, frozen,
with a sparse autoencoder trained on it, labels the rest (named as future work in arXiv 2502.08524).

RUN/first is the run of the first part; its model is the teacher, and the second part goes on with its weights and its
optimizer state. The labels are made while training, so that no token is labelled which the run does not train on.
"""

import dataclasses
from pathlib import Path

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.distributed.checkpoint import latest_checkpoint
from cocomix.distributed.ranks import process_group
from cocomix.training.memory_warning import MemoryWarning
from cocomix.training.run_places import SAE, TEACHER, find_part
from cocomix.training.run_record import FILE_NAME
from cocomix.training.schedule import decay_start
from cocomix.training.trainer import train


def train_self_taught(
    config: Config, resume: bool = False, branch_from: Path | None = None, memory_warning: MemoryWarning | None = None
) -> int:
    """As `trainer.train`, for a config with `teacher.self_taught_after`: first part, SAE, second part, each of them
    where it is missing. With `branch_from`, a run of the same kind, the teacher is that run's.

    Raises `CocomixError` too where the learning rate falls before the second part, and on several ranks where the SAE
    is still to be trained, which one process does.
    """
    run = Path(config.train.run)
    known = branch_from if branch_from is not None else run
    if (known / FILE_NAME).is_file():
        config = _with_teacher_of(config, known)
    if branch_from is not None or latest_checkpoint(run) is not None:
        return train(config, resume, branch_from, memory_warning)
    first = first_part(config)
    with process_group(config.train.timeout_minutes) as ranks:  # one for both parts
        code = train(first, resume, None, memory_warning)
        if code != 0:
            return code
        if ranks.world == 1:
            _train_sae(config)
        elif not (Path(str(config.teacher.sae)) / "config.json").is_file():
            raise CocomixError(
                "the first part is trained; now run `cocomix sae` with this config on one process, then this again"
            )
        return train(config, resume, Path(first.train.run), memory_warning)


def first_part(config: Config) -> Config:
    """The settings of the run of next-token prediction that comes first: the same blocks, data and learning rates.

    Raises `CocomixError` where the second part's rate has begun to fall before it begins.
    """
    train, after = config.train, config.teacher.self_taught_after
    first = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, mixing="none", concept_residual=False, concept_every=1),
        teacher=dataclasses.replace(config.teacher, model=None, sae=None, self_taught_after=0),
        train=dataclasses.replace(
            train,
            run=f"{train.run}/first",
            tokens=after,
            schedule="constant",
            keep_checkpoints=1,
        ),
    )
    last = decay_start(train, config.total_steps)
    if first.total_steps > last:
        raise CocomixError(
            f"teacher.self_taught_after ({after:,} tokens) lies where the learning rate falls already: set it to "
            f"{last * config.tokens_per_step:,} at most, or raise train.tokens"
        )
    return first


def _with_teacher_of(config: Config, run: Path) -> Config:
    """The config with the teacher that a run is recorded with."""
    model, sae = (find_part(run, key, "put back what was there") for key in (TEACHER, SAE))
    teacher = dataclasses.replace(config.teacher, model=model, sae=sae)
    return dataclasses.replace(config, teacher=teacher)


def _train_sae(config: Config) -> None:
    from cocomix.teacher import sae_training

    sae_training.run(config)
