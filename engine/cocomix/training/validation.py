"""Validation while a run trains: loss and perplexity over the windows of a token file, and statistics of concepts."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

from cocomix.core.config import Config
from cocomix.core.methods import CONCEPT_LABELS
from cocomix.data.token_files import TokenFiles, TokenSplit
from cocomix.distributed.ranks import Ranks
from cocomix.teacher.supervision import Supervision
from cocomix.training.concept_statistics import concept_statistics
from cocomix.training.prefetch import StepBatches
from cocomix.training.train_step import training_batches

_STATISTICS_WINDOWS = 32  # that an evaluation looks at for the concept statistics


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the validation loss (nats a token), and for a student of concepts their statistics (see
    `concept_statistics`)."""

    loss: float
    concepts: dict[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return perplexity(self.loss)


class Validation:
    """The evaluations of a run that trains; all ranks make each together."""

    def __init__(self, engine, config: Config, tokens: TokenFiles, supervision: Supervision, ranks: Ranks):
        self._engine, self._config, self._supervision, self._ranks = engine, config, supervision, ranks
        self._train_split, self._val_split = tokens.split("train"), tokens.split("val")

    def evaluate(self) -> Evaluation:
        """Evaluate the student as it is now."""
        learns_concepts = self._supervision.kind(CONCEPT_LABELS) is not None
        return Evaluation(self._loss(), self._concept_statistics() if learns_concepts else {})

    def _loss(self) -> float:
        train, ranks = self._config.train, self._ranks
        total, count = validation_loss(
            self._engine.module,
            self._val_split,
            self._config.data.seq_len,
            train.micro_batch,
            ranks.device,
            max_windows=train.eval_windows,
            rank=ranks.rank,
            world=ranks.world,
        )
        counted = torch.tensor(float(count), dtype=torch.float64, device=ranks.device)
        loss, predictions = ranks.sum(torch.stack([total, counted]))
        return float(loss / predictions)

    def _concept_statistics(self) -> dict[str, float]:
        """Of some training windows, the same in each evaluation: validation windows need not have labels."""
        config, ranks = self._config, self._ranks
        of_all_ranks = config.train.micro_batch * ranks.world
        rounds = min(self._engine.gradient_accumulation_steps(), math.ceil(_STATISTICS_WINDOWS / of_all_ranks))
        labels = self._supervision.of(CONCEPT_LABELS)
        micro_batches = training_batches(config, self._train_split, labels, ranks)
        batches = StepBatches(micro_batches, rounds, labels.add_to, ranks.device).next_step()
        return concept_statistics(self._engine.module, batches, config.model.concept_dim, ranks)


@torch.no_grad()
def validation_loss(
    model, split: TokenSplit, seq_len: int, batch: int, device, *, max_windows: int = 0, rank: int = 0, world: int = 1
) -> tuple[torch.Tensor, int]:
    """Sum of the next-token losses (nats, float64 scalar) and number of predictions, over this rank's windows.

    Reads windows rank, rank + world, ... of the first `max_windows` (0: all) windows of `seq_len` tokens. Every rank
    runs the model equally often, also where there are no windows left for it: under ZeRO-3 a forward pass gathers
    weights, which takes all ranks.
    """
    n_windows = min(split.n_windows(seq_len), max_windows or split.n_windows(seq_len))
    mine = range(rank, n_windows, world)
    total = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for start in range(0, -(-n_windows // world), batch):
        part = mine[start : start + batch]
        windows = np.stack([split.window(i, seq_len) for i in part or range(1)])
        ids = torch.from_numpy(windows).to(device)
        out = model(input_ids=ids, labels=ids, use_cache=False)
        if part:
            loss = out.loss if getattr(out, "ntp_loss", None) is None else out.ntp_loss
            total += loss.double() * len(part) * (seq_len - 1)
    model.train(was_training)
    return total, len(mine) * (seq_len - 1)


def perplexity(loss: float) -> float:
    """exp(loss), infinite rather than an overflow."""
    return math.exp(loss) if loss < 700 else math.inf
