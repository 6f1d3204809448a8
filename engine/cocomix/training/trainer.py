"""Pretraining with DeepSpeed ZeRO: tokens and what the teacher says of them in, checkpoints and a model out."""

import copy
import dataclasses
import functools
import importlib.metadata
import math
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from cocomix.core.config import Config
from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_folder, write_json
from cocomix.core.flops import training_flops
from cocomix.core.methods import LABELS, SOFT_TARGETS
from cocomix.core.shapes import student_shape
from cocomix.costs.memory_check import memory_warning
from cocomix.data.token_files import TokenFiles
from cocomix.data.windows import WindowOrder, step_windows
from cocomix.distributed.checkpoint import CheckpointWriter, latest_checkpoint, load_checkpoint, read_trainer_state
from cocomix.distributed.export import export_checkpoint
from cocomix.distributed.failures import failures_named, require_agreement
from cocomix.distributed.ranks import Ranks, limit_waiting, process_group, rank_and_world
from cocomix.teacher.supervision import Supervision
from cocomix.training.concept_statistics import concept_statistics
from cocomix.training.deepspeed_engine import build_engine
from cocomix.training.loss_watch import LossWatch
from cocomix.training.metrics import MetricsLog, peak_memory_gib, progress_bar
from cocomix.training.prefetch import StepBatches
from cocomix.training.resume import code_fingerprint, require_same_run, settings
from cocomix.training.train_step import TrainStep, build_student, training_batches
from cocomix.training.validation import perplexity, validation_loss

EXIT_RESUME = 75  # the run was interrupted and saved: start it again with --resume (EX_TEMPFAIL of sysexits.h)
_STATISTICS_WINDOWS = 32  # that an evaluation looks at for the concept statistics
_ONE_REQUEST_S = 5  # Ctrl-C reaches a process from the terminal and from its launcher


def train(config: Config, resume: bool = False) -> int:
    """`cocomix train`: pretrain, and return the exit code (0, or `EXIT_RESUME` when interrupted).

    With `resume` the run goes on with the batch after its newest checkpoint (or starts where there is none).
    Raises `CocomixError` for input that does not fit.
    """
    run = Path(config.train.run)
    if _finished(run, config) and resume:
        if rank_and_world()[0] == 0:
            print(f"{run} is finished: {config.total_steps} steps; its model is in {run / 'model'}")
        return 0
    if not resume and latest_checkpoint(run) is not None:
        raise CocomixError(f"{run} already holds a run: pass --resume to go on with it, or set another train.run")
    with process_group(config.train.timeout_minutes) as ranks, failures_named(ranks):
        trainer = Trainer(config, ranks)
        try:
            code = trainer.fit()
            ranks.barrier()  # here, where a rank that dies before it comes is named
            return code
        finally:
            trainer.close()


def _finished(run: Path, config: Config) -> bool:
    latest = latest_checkpoint(run)
    if latest is None or not (run / "model" / "config.json").exists():
        return False
    return read_trainer_state(latest)["step"] >= config.total_steps


class Trainer:
    """One training run: model, DeepSpeed engine, data position, metrics and checkpoints."""

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.run = Path(config.train.run)
        self.tokens = TokenFiles.open(config.data.folder)
        self.train_split, self.val_split = self.tokens.split("train"), self.tokens.split("val")
        self.val_split.n_windows(config.data.seq_len)
        self.supervision = Supervision.from_config(config, self.tokens, ranks.device)
        self.tokenizer = self.tokens.tokenizer()
        require_agreement(ranks, self._identity() | {"the code": code_fingerprint()})
        self.step, self.elapsed_s, self.saved_step = 0, 0.0, None
        self.log = self.validation_loss = self.asked_to_stop = None
        self._warn_of_too_little_memory()
        model = build_student(config, self.tokens.vocab_size, self.tokens.eot_id)
        self.n_parameters = sum(p.numel() for p in model.parameters())  # now: at stage 3 they become empty
        self.engine = build_engine(model, config, ranks.device, ranks.world)
        limit_waiting(config.train.timeout_minutes)
        self.train_step = TrainStep(self.engine, self.supervision, ranks)
        self.watch = LossWatch(config.train.spike_deviations, config.train.max_skipped_steps)
        self.saves = CheckpointWriter(self.run, config.train.keep_checkpoints, self._describe_model, ranks)

    def _warn_of_too_little_memory(self) -> None:
        if self.ranks.is_first and self.ranks.device.type == "cuda":
            memory = torch.cuda.get_device_properties(self.ranks.device).total_memory
            warning = memory_warning(self.config, self.tokens.vocab_size, self.ranks.world, memory)
            if warning:
                print(f"warning: {warning}", file=sys.stderr)

    def _open_log(self) -> MetricsLog | None:
        if not self.ranks.is_first:
            return None
        description = self._describe()
        write_json(self.run / "run.json", description)
        return MetricsLog(self.run, self.config.train, self.step, description)

    def _describe(self) -> dict:
        device = self.ranks.device
        return {
            "name": self.run.name,
            "mode": self.config.model.mixing,
            "labels": self.supervision.kind(LABELS),
            "soft_targets": self.supervision.kind(SOFT_TARGETS),
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"CPU, {torch.get_num_threads()} threads",
            "world_size": self.ranks.world,
            "parameters": self.n_parameters,
            "tokens_per_step": self.config.tokens_per_step,
            "total_steps": self.config.total_steps,
            "seq_len": self.config.data.seq_len,
            "flops_per_token": self._flops_per_token(),
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "cocomix")},
            "config": dataclasses.asdict(self.config),
            "data": {
                "vocab_size": self.tokens.vocab_size,
                "train_tokens": self.train_split.n_tokens,
                "val_tokens": self.val_split.n_tokens,
                "val_unigram_perplexity": self.tokens.meta["val_unigram_perplexity"],
            },
        }

    def _flops_per_token(self) -> int:
        """What the method needs, forward and backward, with the teacher's work where it is done online."""
        return training_flops(student_shape(self.config, self.tokens.vocab_size), self.supervision.teacher_shape)

    def fit(self) -> int:
        """Train to the end or to an interrupt; returns the exit code."""
        self._resume()
        self.log = self._open_log()
        total = self.config.total_steps
        batches = training_batches(self.config, self.train_split, self.supervision, self.ranks, self.step)
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = progress_bar(self.run.name, total, self.step, self.ranks.is_first)
        interval, stop = _Interval(), False
        try:
            while self.step < total and not stop:
                interval.add(self.train_step(batches), self.train_step.was_skipped)
                self.step += 1
                bar.update()
                stop = self._after_step(interval, bar)
            self._finish_save()
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.step < total:
            return self._interrupted()
        if self.saved_step != self.step:
            raise CocomixError(
                f"the last checkpoint of {self.run}, which its model comes from, could not be written: "
                "free some space and start again with --resume"
            )
        return self._finish()

    def _after_step(self, interval, bar) -> bool:
        """Log, evaluate and save where it is time to; whether to stop."""
        total, train = self.config.total_steps, self.config.train
        diverged = self.watch.count(self.train_step.was_skipped)
        stop, save_failed = self._agree_on(self.asked_to_stop is not None, self.saves.has_failed)
        save = stop or self.step == total or (self.step % train.save_every == 0 and not self.train_step.was_skipped)
        if save or diverged or self.step % train.log_every == 0:  # a save too: it holds the running averages
            self._log_interval(interval, bar)
        if diverged:
            raise CocomixError(
                f"training has diverged at step {self.step}: in {self.watch.skipped_in_a_row} steps in a row the loss "
                f"or its gradient was not finite; the last one read {self._where(self.step)}. Lower train.lr or raise "
                "train.warmup_steps, then resume from the last checkpoint"
            )
        if self.step % train.eval_every == 0 or self.step == total:
            interval.pause(self._evaluate)
        if save_failed:
            self._finish_save()
        if save:
            interval.pause(self._save)
        return stop

    def _resume(self) -> None:
        checkpoint = latest_checkpoint(self.run)
        if checkpoint is None:
            return
        state = read_trainer_state(checkpoint)
        changes = require_same_run(state["identity"], self._identity(), checkpoint)
        load_checkpoint(self.engine, checkpoint, self.ranks)
        self.step, self.elapsed_s, self.saved_step = state["step"], state["elapsed_s"], state["step"]
        self.watch.restore(state["loss_watch"])
        if self.ranks.is_first and changes:
            print(f"{self.run} goes on after step {self.step} with changes: {'; '.join(changes)}")

    def _identity(self) -> dict:
        """What decides about the trajectory, and all settings: a resumed run is compared with it."""
        return {**settings(self.config), "the text's fingerprint": self.train_split.fingerprint, **self._fingerprints}

    @functools.cached_property
    def _fingerprints(self) -> dict[str, str]:
        return self.supervision.fingerprints()

    def close(self) -> None:
        """Close the metrics and release the engine."""
        if self.log is not None:
            self.log.close()
        self.engine.destroy()

    def _log_interval(self, interval, bar) -> None:
        names = sorted(interval.losses[0])
        sums = torch.stack([torch.stack([losses[name].double() for name in names]) for losses in interval.losses])
        count = self.engine.gradient_accumulation_steps() * self.ranks.world
        steps = (self.ranks.sum(sums) / count).tolist()  # losses by step and name
        seconds = interval.close()  # after the host has waited for the losses
        self.elapsed_s += seconds
        step_time, tokens_per_step = seconds / len(steps), self.config.tokens_per_step
        taken = [losses for losses, skipped in zip(steps, interval.skipped, strict=True) if not skipped]
        self._report_events(steps, names.index("loss"), interval.skipped)
        interval.reset()
        if self.log is None or not taken:
            return
        losses = {name: statistics.fmean(step[i] for step in taken) for i, name in enumerate(names)}
        self.log.write(
            "train",
            self.step,
            self.step * tokens_per_step,
            **losses,
            **({} if "concept_loss" in losses else {"concept_loss": None}),
            lr=self.train_step.lr,
            grad_norm=float(self.train_step.grad_norm),
            skipped_steps=self.engine.skipped_steps,
            step_time_s=step_time,
            tokens_per_s=tokens_per_step / step_time,
            peak_memory_gib=peak_memory_gib(self.ranks.device),
            elapsed_s=self.elapsed_s,
        )
        bar.set_postfix_str(f"loss {losses['loss']:.3f}, {tokens_per_step / step_time:,.0f} tok/s", refresh=False)

    def _report_events(self, steps, loss, skipped) -> None:
        """Pass the steps of an interval to the watch; say which were skipped or had a spike, and what they read."""
        first = self.step - len(steps) + 1
        for step, losses, was_skipped in zip(range(first, self.step + 1), steps, skipped, strict=True):
            spike = not was_skipped and self.watch.is_spike(losses[loss])
            if self.log is None or not (spike or was_skipped):
                continue
            what = "loss spike" if spike else "skipped: the loss or its gradient is not finite"
            value = losses[loss] if math.isfinite(losses[loss]) else None
            tqdm.write(f"step {step}: {what} (loss {losses[loss]:.4g}); it read {self._where(step)}", file=sys.stderr)
            self.log.event(
                "spike" if spike else "skipped",
                step,
                step * self.config.tokens_per_step,
                loss=value,
                windows=self._windows(step).tolist(),
            )

    def _windows(self, step: int):
        order = WindowOrder(self.train_split.n_windows(self.config.data.seq_len), self.config.train.seed)
        return step_windows(order, step - 1, self.config.train.global_batch)

    def _where(self, step: int) -> str:
        """The batch of a step, in words."""
        windows = self._windows(step)
        more = f" and {len(windows) - 4} more (all are in metrics.jsonl)" if len(windows) > 4 else ""
        return f"windows {', '.join(map(str, windows[:4]))}{more} of {self.config.data.folder}/train.bin"

    def _evaluate(self) -> None:
        config = self.config
        total, count = validation_loss(
            self.engine.module,
            self.val_split,
            config.data.seq_len,
            config.train.micro_batch,
            self.ranks.device,
            max_windows=config.train.eval_windows,
            rank=self.ranks.rank,
            world=self.ranks.world,
        )
        sums = self.ranks.sum(
            torch.stack([total, torch.tensor(float(count), dtype=torch.float64, device=self.ranks.device)])
        )
        self.validation_loss = float(sums[0] / sums[1])
        statistics = {} if self.supervision.kind(LABELS) is None else self._concept_statistics()
        if self.log is not None and not self.log.has_evaluation(self.step):
            self.log.write(
                "eval",
                self.step,
                self.step * config.tokens_per_step,
                loss=self.validation_loss,
                perplexity=perplexity(self.validation_loss),
                elapsed_s=self.elapsed_s,
                **statistics,
            )

    def _concept_statistics(self) -> dict[str, float]:
        """Of some training windows, the same in each evaluation: validation windows need not have labels."""
        train = self.config.train
        rounds = min(
            self.engine.gradient_accumulation_steps(), -(-_STATISTICS_WINDOWS // (train.micro_batch * self.ranks.world))
        )
        labels = self.supervision.of(LABELS)
        micro_batches = training_batches(self.config, self.train_split, labels, self.ranks)
        batches = StepBatches(micro_batches, rounds, labels.add_to, self.ranks.device).next_step()
        return concept_statistics(self.engine.module, batches, self.config.model.concept_dim, self.ranks)

    def _save(self) -> None:
        self._finish_save()
        self.saves.begin(
            self.engine,
            self.step,
            {"elapsed_s": self.elapsed_s, "identity": self._identity(), "loss_watch": self.watch.state()},
        )
        self.saved_step = self.step

    def _finish_save(self) -> None:
        """Wait for the last save; where it failed, stop or go on as the config says."""
        try:
            self.saves.finish()
        except CocomixError as error:
            if not self.config.train.continue_after_failed_save:
                raise
            self.saved_step = None
            if self.ranks.is_first:
                tqdm.write(f"step {self.step}: a save failed and training goes on without it: {error}", file=sys.stderr)

    def _describe_model(self, folder: Path) -> None:
        model = self.engine.module
        with atomic_folder(folder) as aside:
            config = copy.deepcopy(model.config)
            config.architectures = [type(model).__name__]
            config.save_pretrained(aside)
            model.generation_config.save_pretrained(aside)
            self.tokenizer.save_pretrained(aside)

    def _finish(self) -> int:
        if self.validation_loss is None:  # interrupted between the last checkpoint and here
            self._evaluate()
        if self.log is None:
            return 0
        loss = self.validation_loss
        times = sorted(self.log.step_times()[1:] or self.log.step_times())  # the first holds start-up costs
        median = statistics.median(times)
        self.log.write(
            "summary",
            self.step,
            self.step * self.config.tokens_per_step,
            perplexity=perplexity(loss),
            loss=loss,
            tokens_per_s=self.config.tokens_per_step / median,
            step_time_s=median,
            step_time_p10_s=times[len(times) // 10],
            step_time_p90_s=times[-1 - len(times) // 10],
            peak_memory_gib=self.log.peak_memory_gib(),
            elapsed_s=self.elapsed_s,
        )
        export_checkpoint(latest_checkpoint(self.run), self.run / "model")  # last: a run with a model is finished
        print(
            f"{self.run}: validation perplexity {perplexity(loss):.2f} after {self.step} steps; "
            f"the model is in {self.run / 'model'}"
        )
        return 0

    def _on_signal(self, _number, _frame):
        now = time.monotonic()
        if self.asked_to_stop is None:
            self.asked_to_stop = now
        elif now > self.asked_to_stop + _ONE_REQUEST_S:  # asked twice: no more patience for a checkpoint
            raise KeyboardInterrupt

    def _agree_on(self, *flags: bool) -> list[bool]:
        """For each flag whether any rank has set it. Ranks agree on logging steps only, so that no other step waits."""
        if self.ranks.world == 1:
            return list(flags)
        if self.step % self.config.train.log_every:
            return [False] * len(flags)
        return self.ranks.sum(torch.tensor(flags, dtype=torch.float32, device=self.ranks.device)).bool().tolist()

    def _interrupted(self) -> int:
        if self.ranks.is_first:
            print(f"interrupted: saved step {self.step} of {self.config.total_steps}; go on with --resume")
        return EXIT_RESUME


class _Interval:
    """Losses and wall-clock time between two log lines, without evaluations and saves."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.losses, self.skipped, self._start, self._paused = [], [], time.perf_counter(), 0.0

    def add(self, losses, was_skipped):
        self.losses.append(losses)
        self.skipped.append(was_skipped)

    def pause(self, work):
        start = time.perf_counter()
        work()
        self._paused += time.perf_counter() - start

    def close(self) -> float:
        return time.perf_counter() - self._start - self._paused
