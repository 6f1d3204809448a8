"""Pretraining with DeepSpeed ZeRO: tokens and concept labels in, metrics, checkpoints and a model out."""

import dataclasses
import functools
import importlib.metadata
import math
import signal
import statistics
import time
from pathlib import Path

import torch
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from cocomix.checkpoint import latest_checkpoint, load_checkpoint, read_trainer_state, save_checkpoint, save_model
from cocomix.config import Config
from cocomix.data import MicroBatchSampler, TokenFiles, WindowDataset, WindowOrder
from cocomix.deepspeed_engine import build_engine
from cocomix.distributed import Ranks, process_group, rank_and_world
from cocomix.errors import CocomixError
from cocomix.evaluate import perplexity, validation_loss
from cocomix.files import read_json, write_json
from cocomix.labels import LabelSource
from cocomix.metrics import MetricsLog, peak_memory_gib, progress_bar
from cocomix.resume import require_same_run, settings

EXIT_RESUME = 75  # the run was interrupted and saved: start it again with --resume (EX_TEMPFAIL of sysexits.h)

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
    with process_group(config.train.timeout_minutes) as ranks:
        trainer = Trainer(config, ranks)
        try:
            return trainer.fit()
        finally:
            trainer.close()


def _finished(run: Path, config: Config) -> bool:
    latest = latest_checkpoint(run)
    if latest is None or not (run / "model" / "config.json").exists():
        return False
    return read_json(latest / "trainer.json", "the checkpoint's training state")["step"] >= config.total_steps


class Trainer:
    """One training run: model, DeepSpeed engine, data position, metrics and checkpoints."""

    def __init__(self, config: Config, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.run = Path(config.train.run)
        self.tokens = TokenFiles.open(config.data.folder)
        self.train_split, self.val_split = self.tokens.split("train"), self.tokens.split("val")
        self.val_split.n_windows(config.data.seq_len)
        self.labels = LabelSource(config, self.tokens, ranks.device)
        self.tokenizer = self.tokens.tokenizer()
        self.step, self.elapsed_s = 0, 0.0
        self.log = self.validation_loss = self.stop_signal = None
        self.lr = self.grad_norm = math.nan  # of the last step
        model = self._build_model()
        self.n_parameters = sum(p.numel() for p in model.parameters())  # now: at stage 3 they become empty
        self.engine = build_engine(model, config, ranks.device, ranks.world)

    def _build_model(self):
        from cocomix.model import CoCoMixConfig, CoCoMixForCausalLM

        torch.manual_seed(self.config.train.seed)
        return CoCoMixForCausalLM(CoCoMixConfig(
            **dataclasses.asdict(self.config.model), vocab_size=self.tokens.vocab_size,
            n_positions=self.config.data.seq_len, bos_token_id=self.tokens.eot_id, eos_token_id=self.tokens.eot_id,
        ))

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
            "labels": self.labels.kind,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"CPU, {torch.get_num_threads()} threads",
            "world_size": self.ranks.world,
            "parameters": self.n_parameters,
            "tokens_per_step": self.config.tokens_per_step,
            "total_steps": self.config.total_steps,
            "seq_len": self.config.data.seq_len,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "deepspeed", "cocomix")},
            "config": dataclasses.asdict(self.config),
            "data": {
                "vocab_size": self.tokens.vocab_size,
                "train_tokens": self.train_split.n_tokens,
                "val_tokens": self.val_split.n_tokens,
                "val_unigram_perplexity": self.tokens.meta["val_unigram_perplexity"],
            },
        }

    def fit(self) -> int:
        """Train to the end or to an interrupt; returns the exit code."""
        self._resume()
        self.log = self._open_log()
        total, train = self.config.total_steps, self.config.train
        batches = self._batches()
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = progress_bar(self.run.name, total, self.step, self.ranks.is_first)
        interval = _Interval()
        try:
            while self.step < total:
                interval.add(self._train_step(batches))
                self.step += 1
                bar.update()
                stop = self._must_stop()
                save = stop or self.step % train.save_every == 0 or self.step == total
                if save or self.step % train.log_every == 0:  # a save too, since this refuses what is not finite
                    self._log_interval(interval, bar)
                if self.step % train.eval_every == 0 or self.step == total:
                    interval.pause(self._evaluate)
                if save:
                    interval.pause(self._save)
                if stop:
                    break
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self._finish() if self.step >= total else self._interrupted()

    def _resume(self) -> None:
        checkpoint = latest_checkpoint(self.run)
        if checkpoint is None:
            return
        state = read_trainer_state(checkpoint)
        changes = require_same_run(state["identity"], self._identity(), checkpoint)
        load_checkpoint(self.engine, checkpoint, self.ranks)
        self.step, self.elapsed_s = state["step"], state["elapsed_s"]
        if self.ranks.is_first and changes:
            print(f"{self.run} goes on after step {self.step} with changes: {'; '.join(changes)}")

    def _identity(self) -> dict:
        """What decides about the trajectory, and all settings: a resumed run is compared with it."""
        labels = {f"the labels' {name}": value for name, value in self._label_fingerprints.items()}
        return {**settings(self.config), "the text's fingerprint": self.train_split.fingerprint, **labels}

    @functools.cached_property
    def _label_fingerprints(self) -> dict[str, str]:
        if self.labels.cache is not None:
            return self.labels.cache.fingerprints
        return {} if self.labels.teacher is None else self.labels.teacher.fingerprints()

    def close(self) -> None:
        """Close the metrics and release the engine."""
        if self.log is not None:
            self.log.close()
        self.engine.destroy()

    def _batches(self):
        config = self.config
        labels = None if self.labels.cache is None else self.labels
        dataset = WindowDataset(self.train_split, config.data.seq_len, labels)
        sampler = MicroBatchSampler(
            WindowOrder(len(dataset), config.train.seed), config.train.global_batch, config.train.micro_batch,
            self.ranks.rank, self.ranks.world, self.step, config.total_steps,
        )
        return iter(DataLoader(
            dataset, batch_sampler=sampler, pin_memory=self.ranks.device.type == "cuda",
            generator=torch.Generator(),  # making another loader on resume must not draw from the common one
        ))

    def _train_step(self, batches) -> dict[str, torch.Tensor]:
        """One optimizer step; returns the sums of the losses over this rank's micro batches."""
        rounds = self.engine.gradient_accumulation_steps()
        micro_batches = [
            {name: tensor.to(self.ranks.device, non_blocking=True) for name, tensor in next(batches).items()}
            for _ in range(rounds)
        ]
        for batch in micro_batches:
            self.labels.add_to(batch)
        share = self._labelled_tokens(micro_batches) / (rounds * self.ranks.world)
        self.lr = self.engine.get_lr()[0]
        sums = {}
        for batch in micro_batches:
            out = self.engine(**batch, labels=batch["input_ids"], concept_token_count=share)
            self.engine.backward(out.loss)
            if not self.engine.zero_optimization():  # where DeepSpeed itself keeps no norm
                self.grad_norm = get_total_norm(p.grad for p in self.engine.module.parameters() if p.grad is not None)
            self.engine.step()
            for name in ("loss", "ntp_loss", "concept_loss"):
                if getattr(out, name) is not None:
                    sums[name] = sums.get(name, 0) + getattr(out, name).detach()
        return sums

    def _labelled_tokens(self, micro_batches) -> torch.Tensor:
        """Tokens with a label in the whole global batch: what the concept loss of each micro batch is divided by, so
        that any split into ranks and rounds gives the same gradient."""
        count = torch.zeros((), device=self.ranks.device)
        if self.labels.kind is None:
            return count
        for batch in micro_batches:
            count += (batch["concept_labels"] >= 0).any(-1).sum()
        return self.ranks.sum(count).clamp(min=1)

    def _log_interval(self, interval, bar) -> None:
        names = sorted(interval.sums)
        sums = torch.stack([interval.sums[name].double() for name in names])
        count = interval.steps * self.engine.gradient_accumulation_steps() * self.ranks.world
        losses = dict(zip(names, (self.ranks.sum(sums) / count).tolist(), strict=True))
        seconds = interval.close()  # after the host has waited for the losses
        step_time = seconds / interval.steps
        self.elapsed_s += seconds
        interval.reset()
        if self.engine.zero_optimization():
            self.grad_norm = self.engine.get_global_grad_norm()
        grad_norm = float(self.grad_norm)
        if not math.isfinite(losses["loss"] + grad_norm) or self.engine.skipped_steps:
            raise CocomixError(
                f"training has diverged at step {self.step}: the loss is {losses['loss']:.4g}, the gradient's norm "
                f"{grad_norm:.4g}. Lower train.lr or raise train.warmup_steps, then resume from the last checkpoint"
            )
        if self.log is None:
            return
        self.log.write(
            "train", self.step, self.step * self.config.tokens_per_step, **losses,
            **({} if "concept_loss" in losses else {"concept_loss": None}), lr=self.lr, grad_norm=grad_norm,
            step_time_s=step_time, tokens_per_s=self.config.tokens_per_step / step_time,
            peak_memory_gib=peak_memory_gib(self.ranks.device), elapsed_s=self.elapsed_s,
        )
        bar.set_postfix_str(
            f"loss {losses['loss']:.3f}, {self.config.tokens_per_step / step_time:,.0f} tok/s", refresh=False)

    def _evaluate(self) -> None:
        config = self.config
        total, count = validation_loss(
            self.engine.module, self.val_split, config.data.seq_len, config.train.micro_batch, self.ranks.device,
            max_windows=config.train.eval_windows, rank=self.ranks.rank, world=self.ranks.world,
        )
        sums = self.ranks.sum(torch.stack([total, torch.tensor(float(count), dtype=torch.float64,
                                                               device=self.ranks.device)]))
        self.validation_loss = float(sums[0] / sums[1])
        if self.log is not None:
            self.log.write("eval", self.step, self.step * config.tokens_per_step, loss=self.validation_loss,
                           perplexity=perplexity(self.validation_loss), elapsed_s=self.elapsed_s)

    def _save(self) -> None:
        save_checkpoint(
            self.engine, self.run, self.step, {"elapsed_s": self.elapsed_s, "identity": self._identity()}, self.ranks,
            self.config.train.keep_checkpoints, self.tokenizer,
        )

    def _finish(self) -> int:
        if self.validation_loss is None:  # interrupted between the last checkpoint and here
            self._evaluate()
        save_model(self.engine, self.run / "model", self.ranks, self.tokenizer)
        if self.log is None:
            return 0
        loss = self.validation_loss
        times = sorted(self.log.step_times()[1:] or self.log.step_times())  # the first holds start-up costs
        median = statistics.median(times)
        self.log.write(
            "summary", self.step, self.step * self.config.tokens_per_step, perplexity=perplexity(loss), loss=loss,
            tokens_per_s=self.config.tokens_per_step / median, step_time_s=median,
            step_time_p10_s=times[len(times) // 10], step_time_p90_s=times[-1 - len(times) // 10],
            peak_memory_gib=self.log.peak_memory_gib(), elapsed_s=self.elapsed_s,
        )
        print(f"{self.run}: validation perplexity {perplexity(loss):.2f} after {self.step} steps; "
              f"the model is in {self.run / 'model'}")
        return 0

    def _on_signal(self, number, _frame):
        if self.stop_signal is not None:  # asked twice: no more patience for a checkpoint
            raise KeyboardInterrupt
        self.stop_signal = number

    def _must_stop(self) -> bool:
        """Whether any rank was told to stop. Ranks agree on logging steps only, so that no other step waits."""
        if self.ranks.world > 1 and self.step % self.config.train.log_every:
            return False
        return self.ranks.any(self.stop_signal is not None)

    def _interrupted(self) -> int:
        if self.ranks.is_first:
            print(f"interrupted: saved step {self.step} of {self.config.total_steps}; go on with --resume")
        return EXIT_RESUME


class _Interval:
    """Losses and wall-clock time between two log lines, without evaluations and saves."""

    def __init__(self):
        self.reset()

    def reset(self):
        self.sums, self.steps, self._start, self._paused = {}, 0, time.perf_counter(), 0.0

    def add(self, sums):
        for name, value in sums.items():
            self.sums[name] = self.sums.get(name, 0) + value
        self.steps += 1

    def pause(self, work):
        start = time.perf_counter()
        work()
        self._paused += time.perf_counter() - start

    def close(self) -> float:
        return time.perf_counter() - self._start - self._paused
