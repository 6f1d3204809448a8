"""The concepts of a text: which ones a model predicts at each token, and how much each makes up.

Shapes: n tokens of a text, k kept concepts a token, C concepts, K labels.
"""

import re
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch

from cocomix.core.errors import CocomixError
from cocomix.data.tokenizer import encode_document
from cocomix.inference.loading import UsableModel

_CHARACTERS = 16  # of a text for each token that is wanted, at first; more where that is too little
_UNSETTLED = 16  # tokens before a cut that the text behind it might still change
_LONGEST_WORD = 1024  # looked back for a place to cut
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
    n_left_out: int  # bytes of the text (UTF-8) beyond those

    @property
    def main(self) -> np.ndarray:
        """The concept that makes up most of the continuous concept at each token, [n]; -1 where there is none."""
        return np.take_along_axis(self.concepts, self.shares.argmax(1)[:, None], 1)[:, 0]

    @property
    def has_concept(self) -> np.ndarray:
        """Which tokens have a concept position, bool [n]."""
        return self.concepts[:, 0] >= 0


@torch.no_grad()
def read_text(usable: UsableModel, text: str, max_tokens: int, teacher=None, n_bytes: int | None = None) -> Reading:
    """Predict concepts for a text, in windows of the model's context as in training, up to `max_tokens`. `n_bytes` is
    the length of all of it (UTF-8) where `text` is only its beginning.

    Raises `CocomixError` for a text without tokens.
    """
    model, tokenizer = usable.model, usable.tokenizer
    first, n_characters = first_tokens(tokenizer, text, max_tokens)
    if not first:
        raise CocomixError("there is no text to read concepts from")
    n_bytes = len(text.encode("utf-8", "surrogatepass")) if n_bytes is None else n_bytes
    ids = torch.tensor(first, device=model.device)
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
        n_bytes - len(text[:n_characters].encode("utf-8", "surrogatepass")),
    )


def first_tokens(tokenizer, text: str, n: int) -> tuple[list[int], int]:
    """The first n tokens of a text, and how many of its characters they stand for. No more of it is tokenized than that
    takes: tokenizing needs a hundred times the memory of the text."""
    size = _CHARACTERS * n + 1024
    while True:
        end = len(text) if size >= len(text) else _last_word_end(text, size)
        found = encode_document(tokenizer, text[:end], return_offsets_mapping=True)
        ids, places = found["input_ids"], found["offset_mapping"]
        if end == len(text) or len(ids) >= n + _UNSETTLED:
            return ids[:n], places[min(n, len(ids)) - 1][1] if ids else 0
        size *= 4


def _last_word_end(text: str, size: int) -> int:
    """Where the last word before `size` characters ends, behind which a tokenizer begins afresh; `size` without any."""
    cut = re.search(r"\S(?=\s+\S*$)", text[max(0, size - _LONGEST_WORD) : size])
    return size if cut is None else max(0, size - _LONGEST_WORD) + cut.end()


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
