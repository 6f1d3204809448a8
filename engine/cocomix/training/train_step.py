"""One optimizer step of the student: its batches, and the losses, gradients and update that they give."""

import dataclasses
import math

import torch
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader

from cocomix.core.config import Config
from cocomix.core.methods import CONCEPT_LABELS
from cocomix.data.windows import MicroBatchSampler, WindowDataset, WindowOrder
from cocomix.distributed.checkpoint import set_schedule
from cocomix.distributed.ranks import Ranks
from cocomix.training.prefetch import StepBatches


def build_student(config: Config, vocab_size: int, eot_id: int | None = None):
    """The student that the config describes, initialised from train.seed, on the current default device."""
    from cocomix.model.config import CoCoMixConfig
    from cocomix.model.model import CoCoMixForCausalLM

    torch.manual_seed(config.train.seed)
    return CoCoMixForCausalLM(
        CoCoMixConfig(
            **dataclasses.asdict(config.model),
            distillation_weight=config.distillation.weight,
            vocab_size=vocab_size,
            n_positions=config.data.seq_len,
            bos_token_id=eot_id,
            eos_token_id=eot_id,
        )
    )


def training_batches(config: Config, split, supervision, ranks: Ranks, first_step: int = 0):
    """This rank's micro batches from `first_step` to the end of training, on the host: `input_ids` [B, T] int64, and
    what the caches of `supervision` (a `Supervision`) hold.

    What comes when depends on seed and step alone. `split` has `.n_windows(seq_len)` and `.window(index, seq_len)`.
    """
    dataset = WindowDataset(split, config.data.seq_len, supervision)
    sampler = MicroBatchSampler(
        WindowOrder(len(dataset), config.train.seed),
        config.train.global_batch,
        config.train.micro_batch,
        ranks.rank,
        ranks.world,
        first_step,
        config.total_steps,
    )
    return iter(
        DataLoader(
            dataset,
            batch_sampler=sampler,
            pin_memory=ranks.device.type == "cuda",
            generator=torch.Generator(),  # making another loader on resume must not draw from the common one
        )
    )


_LOSSES = ("loss", "ntp_loss", "concept_loss", "distillation_loss")


class TrainStep:
    """Optimizer steps of an engine, whose batches get from `supervision` (a `Supervision`) what its teachers make.

    After a step `lr` is its learning rate, `was_skipped` says whether the update was left out because a loss or a
    gradient was not finite (on all ranks alike), and `grad_norm` is the norm, before clipping, of the last gradient
    that was finite (NaN before the first).
    """

    def __init__(self, engine, supervision, ranks: Ranks):
        self.engine, self.supervision, self.ranks = engine, supervision, ranks
        self.lr, self.grad_norm, self.was_skipped = math.nan, math.nan, False
        self._learns_concepts = supervision.kind(CONCEPT_LABELS) is not None
        self._ahead = None

    def __call__(self, batches) -> dict[str, torch.Tensor]:
        """Take the next of `batches`; returns the sums of the losses over this rank's micro batches, by name.

        `batches` is the same iterator in each call: on a GPU it is read ahead.
        """
        engine = self.engine
        rounds = engine.gradient_accumulation_steps()
        if self._ahead is None:
            self._ahead = StepBatches(
                batches,
                rounds,
                lambda batch: self.supervision.add_to(batch),  # looked up each time: the profiler replaces it
                self.ranks.device,
                whole_steps=self._learns_concepts,
            )
        micro_batches = self._ahead.next_step()
        share = None
        if self._learns_concepts:
            share = self._labelled_tokens(micro_batches) / (rounds * self.ranks.world)
        self.lr, skipped_before, sums = engine.get_lr()[0], engine.skipped_steps, {}
        for batch in micro_batches:
            losses = self._forward_backward(batch, share)
            self._ahead.prefetch()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss
            if not engine.zero_optimization() and engine.is_gradient_accumulation_boundary():
                self._check_replicated_gradients()
            engine.step()
        self.was_skipped = engine.skipped_steps > skipped_before
        if self.was_skipped:
            set_schedule(engine.lr_scheduler, engine.global_steps)  # the schedule counts every step
        elif engine.zero_optimization():
            self.grad_norm = engine.get_global_grad_norm()
        return sums

    def _forward_backward(self, batch, share) -> dict[str, torch.Tensor]:
        out = self.engine(**batch, labels=batch["input_ids"], concept_token_count=share)
        # A loss can be infinite and its gradient finite: this makes the gradient NaN, which skips the step.
        self.engine.backward(out.loss * torch.where(out.loss.detach().isfinite(), 1.0, math.nan))
        losses = {name: getattr(out, name) for name in _LOSSES}
        return {name: loss.detach() for name, loss in losses.items() if loss is not None}

    def _check_replicated_gradients(self) -> None:
        """At stage 0 the optimizer is PyTorch's own: what DeepSpeed's would find out is told to it."""
        norm = get_total_norm(p.grad for p in self.engine.module.parameters() if p.grad is not None)
        optimizer = self.engine.optimizer
        optimizer.overflow = not norm.isfinite().item()  # DeepSpeed counts it
        optimizer.found_inf = torch.tensor(float(optimizer.overflow), device=norm.device)  # AdamW leaves the step out
        if not optimizer.overflow:
            self.grad_norm = norm

    def _labelled_tokens(self, micro_batches) -> torch.Tensor:
        """Tokens with a label in the whole global batch: what the concept loss of each micro batch is divided by, so
        that any split into ranks and rounds gives the same gradient."""
        count = torch.zeros((), device=self.ranks.device)
        chosen = self.engine.module.config.concept_tokens
        for batch in micro_batches:
            count += (batch["concept_labels"][:, chosen] >= 0).any(-1).sum()
        return self.ranks.sum(count).clamp(min=1)
