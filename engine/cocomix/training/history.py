"""What the folder of a run holds of earlier training, so that none is started over by accident."""

from pathlib import Path

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.distributed.checkpoint import begun_checkpoints, latest_checkpoint, read_trainer_state
from cocomix.training.metrics import FILE_NAME as METRICS
from cocomix.training.metrics import readable_lines
from cocomix.training.run_record import FILE_NAME as RECORD
from cocomix.training.run_record import RunRecord


def is_finished(run: Path, config: Config) -> bool:
    """Whether the run has trained as long as the config asks for and has its model, its checkpoints or none of them."""
    if not (run / "model" / "config.json").exists():
        return False
    latest = latest_checkpoint(run)
    return (_last_step(run, "summary") if latest is None else read_trainer_state(latest)["step"]) >= config.total_steps


def require_no_lost_history(run: Path) -> None:
    """Raise `CocomixError` where a run without a complete checkpoint has trained further than one that was stopped
    before its first save: starting at the first step would replace what is there."""
    if latest_checkpoint(run) is not None:
        return
    if (run / "model" / "config.json").exists():
        what = "holds a finished model"
    elif _must_have_saved(run):
        what = f"has trained for {_last_step(run)} steps"
    else:
        return
    raise CocomixError(
        f"{run} {what}, but no complete checkpoint to go on from is in {run / 'checkpoints'}, and starting over would "
        "replace it: put the checkpoints back, or set another train.run, or delete the folder to start over"
    )


def passed_over(run: Path, taken: Path | None) -> list[Path]:
    """Checkpoints that are newer than the one which is `taken`, and incomplete."""
    return [folder for folder in begun_checkpoints(run) if taken is None or folder.name > taken.name]


def _must_have_saved(run: Path) -> bool:
    """Whether the figures that were logged lie behind a save that was over when they were. One begins after every
    train.save_every steps, and waits for the one before it."""
    if not (run / RECORD).is_file():
        return False
    record = RunRecord.read(run)
    every = record.config.get("train", {}).get("save_every", 0)
    if not isinstance(every, int) or every < 1:
        return False
    first = 0 if record.branched_from is None else record.branched_from.step
    begun = (_last_step(run) - 1) // every - first // every  # the last step's own save may be about to begin
    return begun > 1 or (begun == 1 and not begun_checkpoints(run))


def _last_step(run: Path, *kinds: str) -> int:
    """The last step that metrics.jsonl tells of, in lines of these kinds or any; 0 where it tells none."""
    path = run / METRICS
    if not path.is_file():
        return 0
    lines = (line for line in readable_lines(path) if not kinds or line["kind"] in kinds)
    return max((line["step"] for line in lines), default=0)
