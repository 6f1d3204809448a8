"""Cards of single concepts: what is known of one from a text, a corpus and the weights of the model.

Shapes: C concepts, V vocabulary.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from cocomix.inference.concept_reading import Reading, compress_norms
from cocomix.inference.concept_survey import Context, Survey
from cocomix.inference.loading import UsableModel
from cocomix.inference.steering import steer

_CARDS = 24  # concepts of a text that get a card of their own
_PROMOTED = 8  # tokens that a concept promotes


@dataclass(frozen=True)
class Card:
    """What is known of one concept."""

    concept: int
    norm: float  # of its row of W_c
    in_text: int  # tokens of the text at which it is kept
    labelled: int | None  # tokens of the text that the teacher labels with it
    agreed: int | None  # those of them at which it is kept
    direct: list[tuple[str, float]]  # tokens that its row points at, see `direct_tokens`
    measured: list[tuple[str, float, float]]  # tokens, with and without it, see `measured_tokens`
    contexts: list[Context]


@torch.no_grad()
def direct_tokens(usable: UsableModel, concept: int, n: int = _PROMOTED) -> list[tuple[str, float]]:
    """The tokens that a concept's row of W_c points at, with their logits: the row alone through the final norm and
    the head, at unit scale and without the norm's bias.

    An approximation: it sees the path along the residual stream alone and none of the blocks after the mixing, which
    may turn the row into something else.
    """
    model = usable.model
    row, norm = model.base_model.compress_layer.weight[concept], model.base_model.ln_f
    unit = torch.nn.functional.layer_norm(row, row.shape, norm.weight, None, eps=1e-12)
    top = model.get_output_embeddings()(unit).float().topk(min(n, model.config.vocab_size))
    return [
        (usable.tokenizer.decode([token]), logit)
        for logit, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    ]


@torch.no_grad()
def measured_tokens(
    usable: UsableModel, concept: int, contexts: list[Context], n: int = _PROMOTED
) -> list[tuple[str, float, float]]:
    """The next tokens that lose most probability when a concept's logit is set to zero in its strongest contexts, with
    their mean probabilities as the model is and without the concept. No approximation, but it says what holds there
    and nowhere else, and the next concept in line may take the place."""
    model = usable.model
    sums = torch.zeros(2, model.config.vocab_size, dtype=torch.float64, device=model.device)
    for context in contexts:
        ids = torch.from_numpy(context.ids)[None].to(model.device)
        sums[0] += model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].double().softmax(-1)
        with steer(model, {concept: "set:0"}):
            sums[1] += model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].double().softmax(-1)
    with_it, without = sums / max(len(contexts), 1)
    top = (with_it - without).topk(min(n, len(without)))
    return [
        (usable.tokenizer.decode([token]), with_it[token].item(), without[token].item())
        for change, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
        if change > 0
    ]


def make_card(usable: UsableModel, concept: int, reading: Reading | None, surveyed: Survey) -> Card:
    """Put together what is known of a concept that the survey followed."""
    contexts = surveyed.followed[concept].contexts
    kept = (reading.concepts == concept).any(1) if reading else np.zeros(0, dtype=bool)
    labelled = (reading.labels == concept).any(1) if reading and reading.labels is not None else None
    return Card(
        concept,
        compress_norms(usable.model)[concept].item(),
        int(kept.sum()),
        None if labelled is None else int(labelled.sum()),
        None if labelled is None else int((labelled & kept).sum()),
        direct_tokens(usable, concept),
        measured_tokens(usable, concept, contexts),
        contexts,
    )


def chosen_concepts(reading: Reading | None, wanted: list[int], n: int = _CARDS) -> list[int]:
    """`wanted` first, then the `n` that are the main concept at most tokens of the text."""
    main = reading.main[reading.has_concept].tolist() if reading else []
    found = [concept for concept, _ in Counter(main).most_common(n)]
    return list(dict.fromkeys([*wanted, *found]))
