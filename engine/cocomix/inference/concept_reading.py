"""The concepts of a text: which ones a model predicts at each token, and how much each makes up.

Shapes: n tokens of a text, k kept concepts a token, C concepts, K labels.
"""

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from cocomix.core.errors import CocomixError
from cocomix.inference.loading import UsableModel

_IGNORED = 0.1  # a row of the compress layer is ignored below this share of the median norm


@dataclass(frozen=True)
class Reading:
    """The concepts of a text. `shares` are |weight| times the norm of the concept's row of W_c, over their sum at the
    token: how much of the continuous concept each makes up. Labels are -1 where there are fewer than K. At a token that
    has no concept position (`concept_every`) concepts and labels are -1, weights and shares 0."""

    ids: np.ndarray  # [n]
    tokens: list[str]
    concepts: np.ndarray  # [n, k], the largest weight first
    weights: np.ndarray  # [n, k], the kept logits
    shares: np.ndarray  # [n, k], they sum to 1
    labels: np.ndarray | None  # [n, K], None without a teacher
    window: int  # tokens that were read together
    n_left_out: int  # tokens of the text beyond those

    @property
    def main(self) -> np.ndarray:
        """The concept that makes up most of the continuous concept at each token, [n]; -1 where there is none."""
        return np.take_along_axis(self.concepts, self.shares.argmax(1)[:, None], 1)[:, 0]

    @property
    def has_concept(self) -> np.ndarray:
        """Which tokens have a concept position, bool [n]."""
        return self.concepts[:, 0] >= 0


@torch.no_grad()
def read_text(usable: UsableModel, text: str, max_tokens: int, teacher=None) -> Reading:
    """Predict concepts for a text, in windows of the model's context as in training, up to `max_tokens`.

    Raises `CocomixError` for a text without tokens.
    """
    model, tokenizer = usable.model, usable.tokenizer
    all_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not all_ids:
        raise CocomixError("there is no text to read concepts from")
    ids = torch.tensor(all_ids[:max_tokens], device=model.device)
    context = cast(int, usable.context)  # every student has one
    kept, labels = [], []
    for window in ids.split(context):
        out = model.base_model(window[None], use_cache=False)
        chosen = model.config.concept_tokens  # of the window
        kept.append([_spread(part[0], window, chosen) for part in (out.concept_indices, out.concept_values.float())])
        if teacher is not None:
            labels.append(_spread(teacher.labels(window[None])[0, chosen], window, chosen))
    concepts, weights = (torch.cat(parts) for parts in zip(*kept, strict=True))
    weights = weights.where(concepts >= 0, 0.0)
    strengths = weights.abs() * compress_norms(model)[concepts]
    shares = strengths / strengths.sum(1, keepdim=True).clamp(min=torch.finfo(strengths.dtype).tiny)
    return Reading(
        ids.cpu().numpy(),
        [tokenizer.decode([i]) for i in ids.tolist()],
        concepts.cpu().numpy(),
        weights.cpu().numpy(),
        shares.cpu().numpy(),
        torch.cat(labels).cpu().numpy() if labels else None,
        context,
        len(all_ids) - len(ids),
    )


def _spread(values: torch.Tensor, window: torch.Tensor, chosen: slice) -> torch.Tensor:
    """What the `chosen` tokens of a window [T] have, [., n], at their places; -1 at the others [T, n]."""
    spread = values.new_full((len(window), values.shape[1]), -1)
    spread[chosen] = values
    return spread


def agreement(reading: Reading) -> str:
    """How many of the teacher's labels are among the predicted concepts, in words; nothing without labels."""
    if reading.labels is None or not (reading.labels >= 0).any():
        return ""
    given = reading.labels >= 0
    found = (reading.labels[:, :, None] == reading.concepts[:, None, :]).any(2) & given
    return f"; {found.sum():,} of the teacher's {given.sum():,} labels are among them ({found.sum() / given.sum():.0%})"


def compress_norms(model) -> torch.Tensor:
    """Norm of each concept's row of the compress layer's W_c, float32 [C]: how strongly the model can use it."""
    return torch.linalg.vector_norm(model.base_model.compress_layer.weight.detach().float(), dim=1)


def ignored(norms: np.ndarray) -> np.ndarray:
    """Which rows of the compress layer are so small that the model makes no use of them, bool [C]."""
    return norms < _IGNORED * np.median(norms)
