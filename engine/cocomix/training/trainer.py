"""Pretraining with DeepSpeed ZeRO: tokens and what the teacher says of them in, checkpoints and a model out."""

import dataclasses
import functools
from pathlib import Path
from typing import cast

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.files import sweep_leftovers
from cocomix.core.precision import STUDENT, TEACHER, settled
from cocomix.data.token_files import TokenFiles
from cocomix.distributed.checkpoint import latest_checkpoint, load_checkpoint, read_trainer_state
from cocomix.distributed.export import export_checkpoint
from cocomix.distributed.failures import failures_named, only_writers, require_agreement
from cocomix.distributed.ranks import Ranks, limit_waiting, process_group
from cocomix.teacher.supervision import Supervision
from cocomix.training.branch import branch_point, cost_until, require_source, take_metrics
from cocomix.training.deepspeed_engine import build_engine
from cocomix.training.divergence_watch import DivergenceWatch
from cocomix.training.history import is_finished, passed_over, require_no_lost_history
from cocomix.training.interval import Interval
from cocomix.training.memory_warning import MemoryWarning, warn_of_memory
from cocomix.training.resume import code_fingerprint, grows, identity, precision_begun_with, require_same_run
from cocomix.training.run_description import describe_run
from cocomix.training.run_log import RunLog
from cocomix.training.run_record import Branch, recorded_branch, recorded_id
from cocomix.training.save_policy import SavePolicy
from cocomix.training.stop_requests import StopRequests
from cocomix.training.train_step import TrainStep, build_student, training_batches
from cocomix.training.validation import Evaluation, Validation

EXIT_RESUME = 75  # the run was interrupted and saved: start it again with --resume (EX_TEMPFAIL of sysexits.h)


def train(
    config: Config, resume: bool = False, branch_from: Path | None = None, memory_warning: MemoryWarning | None = None
) -> int:
    """`cocomix train`: pretrain, and return the exit code (0, or `EXIT_RESUME` when interrupted).

    With `resume` the run continues with the batch after its newest checkpoint (or starts where there is none). A run
    without one begins with a checkpoint of the run in `branch_from`, where it is given: the newest one until which both
    have the same learning rates. `memory_warning` says whether the GPUs' memory suffices. Raises `CocomixError` for
    input that does not fit.
    """
    run = Path(config.train.run)
    if run.exists() and not run.is_dir():
        raise CocomixError(f"train.run is {run}, which is a file: name a folder")
    with process_group(config.train.timeout_minutes) as ranks, failures_named(ranks):
        # The first rank tells the others: another process may finish the run between two looks.
        if resume and ranks.from_first(ranks.is_first and is_finished(run, config)):
            if ranks.is_first:
                print(f"{run} is finished: {config.total_steps} steps; its model is in {run / 'model'}")
            return 0
        _require_free(run, resume)
        require_source(config, branch_from, recorded_branch(run))
        with only_writers(ranks, config.train.run, "cocomix train"):
            _require_free(run, resume)  # again, for another process may have trained here until the lock was ours
            if ranks.is_first:
                sweep_leftovers(run)
            return _train(config, ranks, branch_from, memory_warning)


def _train(config: Config, ranks: Ranks, branch_from: Path | None, memory_warning: MemoryWarning | None) -> int:
    trainer = Trainer(config, ranks, branch_from, memory_warning)
    try:
        code = trainer.fit()
        ranks.barrier()  # here, where a rank that dies before it comes is named
        return code
    finally:
        trainer.close()


def _require_free(run: Path, resume: bool) -> None:
    """Raise `CocomixError` where the folder holds a run that would be replaced."""
    if not resume and latest_checkpoint(run) is not None:
        raise CocomixError(f"{run} already holds a run: pass --resume to go on with it, or set another train.run")
    require_no_lost_history(run)


class Trainer:
    """One training run: what it is made of, and the loop over it."""

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        branch_from: Path | None = None,
        memory_warning: MemoryWarning | None = None,
    ):
        begun_with = functools.partial(precision_begun_with, source=branch_from)
        config, notes = settled(config, ranks.device.type, begun_with)
        self.branch_from = branch_from
        self.config, self.ranks, self.run = config, ranks, Path(config.train.run)
        tokens = TokenFiles.open(config.data.folder)
        self.train_split = tokens.split("train")
        tokens.split("val").n_windows(config.data.seq_len)  # raises where there is none
        tokenizer = tokens.tokenizer()
        self.supervision = Supervision.from_config(config, tokens, ranks.device)
        fingerprints = self.supervision.fingerprints()
        self.identity = identity(config, self.train_split.fingerprint, fingerprints)
        require_agreement(ranks, self.identity | {"the code": code_fingerprint()})
        if ranks.is_first:
            for name in (STUDENT, TEACHER) if self.supervision.teachers else (STUDENT,):
                if name in notes:
                    print(notes[name])
        warn_of_memory(memory_warning, config, tokens.vocab_size, ranks)
        model = build_student(config, tokens.vocab_size, tokens.eot_id)
        n_parameters = sum(parameter.numel() for parameter in model.parameters())  # at stage 3 they become empty
        self.record = describe_run(config, tokens, self.supervision, ranks, n_parameters, fingerprints)
        self.engine = build_engine(model, config, ranks.device, ranks.world)
        limit_waiting(config.train.timeout_minutes)
        self.train_step = TrainStep(self.engine, self.supervision, ranks)
        self.watch = DivergenceWatch(config, self.train_split)
        self.validation = Validation(self.engine, config, tokens, self.supervision, ranks)
        self.saves = SavePolicy(self.engine, config, tokenizer, ranks)
        self.step = 0
        self.evaluation: Evaluation | None = None  # the newest one
        self.log: RunLog | None = None  # once training starts
        self.logged_lines = 0  # of metrics.jsonl when the checkpoint was made that training goes on from

    def fit(self) -> int:
        """Train to the end or to an interrupt; returns the exit code."""
        elapsed_s = self._begin()
        config, ranks, watch, saves = self.config, self.ranks, self.watch, self.saves
        total, log_every, eval_every = config.total_steps, config.train.log_every, config.train.eval_every
        self.log = log = RunLog(self.record, config, ranks, self.step, elapsed_s)
        log.require_lines(self.logged_lines)
        batches = training_batches(config, self.train_split, self.supervision, ranks, self.step)
        with StopRequests(ranks, log_every) as requests, log.bar as bar:
            interval, stops = Interval(ranks, self.engine.gradient_accumulation_steps()), False
            while self.step < total and not stops:
                losses = self.train_step(batches)
                was_skipped = self.train_step.was_skipped
                self.step += 1
                bar.update()
                interval.add(losses, was_skipped)
                watch.count(was_skipped)
                stops = requests.agreed(self.step)
                is_saved = saves.is_due(self.step, was_skipped, stops)
                # Before each save too, since it holds what the watch has seen.
                if is_saved or watch.has_diverged or self.step % log_every == 0:
                    figures = interval.close()
                    log.events(watch.observe(figures, self.step))
                    log.training(self.step, figures, self.train_step)
                watch.require_no_divergence(self.step)
                if self.step % eval_every == 0 or self.step == total:
                    with interval.paused():
                        self._evaluate(log)
                saves.notice_failure(self.step)
                if is_saved:
                    with interval.paused():
                        saves.begin(self.step, self._state(log))
            saves.finish(self.step)
        return self._finish(log) if self.step >= total else self._interrupted()

    def _begin(self) -> float:
        """Go on where the newest checkpoint was made, or begin with another run's, or at the first step; returns the
        seconds of training until then."""
        checkpoint = latest_checkpoint(self.run)
        if self.ranks.is_first:
            for folder in passed_over(self.run, checkpoint):
                print(f"{folder} is incomplete, since its save was cut off: passed over")
        if checkpoint is not None:
            state, changes = self._go_on_from(checkpoint)
            self.saves.saved_step = self.step
            self.logged_lines = state.get("logged_lines", 0)  # runs of earlier versions did not count them
            branch = state.get("branched_from")  # runs of earlier versions have none
            self.record = dataclasses.replace(
                self.record, branched_from=branch and Branch(**branch), id=recorded_id(self.run)
            )
            if self.ranks.is_first and changes:
                print(f"{self.run} continues after step {self.step} with changes: {'; '.join(changes)}")
            return state["elapsed_s"]
        if self.branch_from is None:
            return 0.0
        state, _ = self._go_on_from(self._branch_point(self.branch_from), branches=True)
        tokens = self.step * self.config.tokens_per_step
        cost = cost_until(self.branch_from, tokens, self.config, self.supervision.teacher_shape)
        branch = Branch(str(self.branch_from), self.step, cost)
        self.record = dataclasses.replace(self.record, branched_from=branch)
        if self.ranks.is_first:
            take_metrics(self.branch_from, self.run)
            grown = ", with new concept layers" if grows(state["identity"], self.identity) else ""
            print(f"{self.run} begins after step {self.step} of {self.branch_from}{grown}")
        return state["elapsed_s"]

    def _branch_point(self, source: Path) -> Path:
        """What the first rank finds: the other run may be training, and save between two looks."""
        found, problem = None, None
        if self.ranks.is_first:
            try:
                found = branch_point(source, self.config)
            except CocomixError as error:
                problem = str(error)
        found, problem = self.ranks.from_first((found, problem))
        if problem is not None:
            raise CocomixError(problem)
        return cast(Path, found)

    def _go_on_from(self, checkpoint: Path, branches: bool = False) -> tuple[dict, list[str]]:
        """Take over the state of a checkpoint; returns what its trainer.json holds, and the changes in words."""
        state = read_trainer_state(checkpoint)
        changes = require_same_run(state["identity"], self.identity, checkpoint, branches)
        if branches and grows(state["identity"], self.identity):
            load_checkpoint(self.engine, checkpoint, self.ranks, self.engine.module.concept_parameters())
        else:
            load_checkpoint(self.engine, checkpoint, self.ranks)
            self.watch.restore(state["loss_watch"])  # of a loss that has no other terms yet it would see a spike
        self.step = state["step"]
        return state, changes

    def _state(self, log: RunLog) -> dict:
        """What `_begin` reads of a checkpoint, beside the engine's state."""
        branch = self.record.branched_from
        return {
            "elapsed_s": log.elapsed_s,
            "logged_lines": log.n_lines,
            "identity": self.identity,
            "loss_watch": self.watch.state(),
            "branched_from": branch and dataclasses.asdict(branch),
        }

    def _evaluate(self, log: RunLog) -> Evaluation:
        self.evaluation = self.validation.evaluate()
        log.evaluation(self.step, self.evaluation)
        return self.evaluation

    def _interrupted(self) -> int:
        if self.ranks.is_first:
            print(f"interrupted: saved step {self.step} of {self.config.total_steps}; go on with --resume")
        return EXIT_RESUME

    def _finish(self, log: RunLog) -> int:
        self.saves.require_saved(self.step)
        evaluation = self.evaluation or self._evaluate(log)  # none: interrupted between the last checkpoint and here
        log.summary(self.step, evaluation)
        if self.ranks.is_first:
            checkpoint = cast(Path, latest_checkpoint(self.run))
            export_checkpoint(checkpoint, self.run / "model")  # last: a run with a model is finished
            print(
                f"{self.run}: validation perplexity {evaluation.perplexity:.2f} after {self.step} steps; "
                f"the model is in {self.run / 'model'}"
            )
        return 0

    def close(self) -> None:
        """Close the metrics and release the engine."""
        if self.log is not None:
            self.log.close()
        self.engine.destroy()
