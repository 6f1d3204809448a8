"""Steering: concept logits changed before the TopK, exactly and without a dense [N, C] matrix.

The k + n largest logits of the unchanged model hold, beside the n steered concepts, at least the k largest of all
others. So those without the steered concepts, and the steered concepts' own logits (n products a token), are all that
a TopK over the changed logits can choose from.

Shapes: N tokens, d width, C concepts, k kept concepts, n steered ones.
"""

import contextlib
import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cocomix.core.errors import CocomixError
from cocomix.core.methods import mixes_concepts
from cocomix.teacher.language_model import transformer_blocks
from cocomix_kernels import ConceptHead, concept_head

SYNTAX = (
    "ID=F or ID=xF multiplies the concept's logit by F, ID=set:F sets it, ID=force keeps the concept whatever "
    "its logit, ID=force:F keeps it with the logit F"
)


@dataclass(frozen=True)
class Operation:
    """What happens to one concept's logit: `kind` is "multiply", "set" or "force"; "force" without a strength keeps
    the concept with the logit that it has."""

    kind: str
    strength: float | None

    def __str__(self):
        if self.kind == "multiply":
            return f"x{self.strength:g}"
        return self.kind if self.strength is None else f"{self.kind}:{self.strength:g}"

    def __call__(self, logits):
        """The changed logits, of the same shape."""
        if self.kind == "multiply":
            return logits * self.strength
        return logits if self.strength is None else torch.full_like(logits, self.strength)


_LARGEST = 1e30  # so that logits stay finite in float32 and bfloat16
Steps = dict[int, tuple[Operation, ...]]  # by concept: what happens to it, in order


def parse_operation(value) -> Operation:
    """What is meant by a number (multiply) or by the text after `ID=` on the command line. Raises `CocomixError`."""
    if not isinstance(value, str):
        return Operation("multiply", _number(value))
    kind, colon, strength = value.strip().partition(":")
    if kind == "force" and not colon:
        return Operation("force", None)
    if kind in ("set", "force") and colon:
        return Operation(kind, _number(strength))
    return Operation("multiply", _number(value.strip().removeprefix("x")))


def _number(value) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not abs(number) <= _LARGEST:
        raise CocomixError(f"{value!r} is not a steering strength: expected a number up to {_LARGEST:g}; {SYNTAX}")
    return number


def check_concept(concept: int, n_concepts: int) -> int:
    """`concept` as an int. Raises `CocomixError` unless it is one of `n_concepts`."""
    try:
        number = operator.index(concept)
    except TypeError:
        raise CocomixError(f"{concept!r} is not a concept: expected a number from 0 to {n_concepts - 1}") from None
    if not 0 <= number < n_concepts:
        raise CocomixError(f"there is no concept {number}: this model has the concepts 0 to {n_concepts - 1}")
    return number


def require_concepts(model) -> None:
    """Raise `CocomixError` unless the model predicts concepts and mixes them in."""
    mixing = getattr(model.config, "mixing", None)
    if mixing is None or not mixes_concepts(mixing):
        kind = getattr(model.config, "model_type", type(model).__name__)
        how = "without mixing" if mixing is None else f"with mixing={mixing}"
        raise CocomixError(
            f"this model mixes no concepts in (a {kind} model {how}): take a CoCoMix model that was "
            "trained with model.mixing=interleave or add"
        )


@contextlib.contextmanager
def steer(model, concepts: Mapping[int, float | str]) -> Iterator[None]:
    """Change concept logits of a CoCoMix model inside the block, at every token, before the TopK.

    `concepts` maps concept ids to a number, by which the logit is multiplied, or to a text as on the command line:
    "x3" multiplies, "set:0" sets, "force" keeps the concept among the k whatever its logit, "force:5" keeps it with
    that logit. Forced concepts take the places of the lowest others. What the model computes equals a TopK over the
    changed logits of all concepts; `concept_values` and `concept_indices` of its output are what was mixed in, and
    `concept_loss` stays that of its own prediction.

    Blocks nest: the outer one's change comes first. Cached keys and values of tokens that were read before the block
    stay as they are. The model is left as it was, also by an exception. Raises `CocomixError` for a model without
    concepts, one in training mode, and for ids and strengths that cannot be.
    """
    require_concepts(model)
    if model.training:
        raise CocomixError("a model is never steered while it trains: call model.eval() first")
    predictor = model.base_model.concept_predictor
    previous = predictor.steering
    steps = add_steps(getattr(previous, "steps", {}), concepts, model.config.concept_dim)
    _require_room(steps, model.config.concept_topk)
    predictor.steering = SteeredHead(steps) if steps else None
    try:
        yield
    finally:
        predictor.steering = previous


@contextlib.contextmanager
def steer_teacher(teacher, concepts: Mapping[int, float | str]) -> Iterator[None]:
    """Steer the SAE of a `ConceptTeacher` inside the block, with the operations of `steer` on its latents.

    Each steered latent's change times its decoder row is added to the residual stream after the teacher's block, in
    the scale of the input, so that the SAE's own error stays in. A latent counts as zero where it is not active;
    "force" takes it as its pre-activation has it, if that is positive. Raises `CocomixError` for ids and strengths
    that cannot be.
    """
    sae = teacher.sae
    steps = add_steps({}, concepts, sae.n_latents)
    if not steps:
        yield
        return
    steered = sorted(steps)
    decoder = sae.decoder[steered]

    def hook(_module, _args, output):
        residual = output[0] if isinstance(output, tuple) else output
        x_hat, _, std = sae.normalize(residual.flatten(0, -2))
        values, indices = sae.encode_normalized(x_hat)
        active, _ = _pick(values.new_zeros(len(values), len(steered)), values, indices, steered, sae.n_latents)
        encoded = F.linear((x_hat - sae.pre_bias).to(decoder.dtype), sae.W_enc[steered], sae.latent_bias[steered])
        forced = torch.tensor([concept in _forced(steps) for concept in steered], device=residual.device)
        available = torch.where(forced, encoded.relu().to(active.dtype), active)
        change = ((_apply(steps, available) - active).to(decoder.dtype) @ decoder) * std
        changed = (residual + change.view_as(residual)).to(residual.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = transformer_blocks(teacher.model)[teacher.layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def add_steps(steps: Steps, concepts: Mapping[int, float | str], n_concepts: int) -> Steps:
    """`steps` followed by what `concepts` asks for. Raises `CocomixError` for an id or strength that cannot be."""
    steps = dict(steps)
    for concept, value in concepts.items():
        concept = check_concept(concept, n_concepts)
        steps[concept] = (*steps.get(concept, ()), parse_operation(value))
    return steps


def _forced(steps: Steps) -> set[int]:
    return {concept for concept, operations in steps.items() if any(step.kind == "force" for step in operations)}


def _require_room(steps, k):
    if len(_forced(steps)) > k:
        raise CocomixError(
            f"{len(_forced(steps))} concepts are forced, but the model keeps {k} at each token: force fewer"
        )


class SteeredHead:
    """`concept_head` with changed logits: TopK of x W^T + b after `steps` were applied to the columns they name."""

    def __init__(self, steps: Steps):
        self.steps = steps

    def __call__(self, x, weight, bias, k, labels=None) -> ConceptHead:
        """x [N, d], weight [C, d], bias [C] -> as `concept_head`; the loss is that of the unchanged logits."""
        steered, n_concepts = sorted(self.steps), weight.shape[0]
        head = concept_head(x, weight, bias, min(k + len(steered), n_concepts), labels)
        own = F.linear(x, weight[steered], bias[steered]).to(head.values.dtype)
        own, found = _pick(own, head.values, head.indices, steered, n_concepts)
        changed, others = _apply(self.steps, own), head.values.masked_fill(found, -math.inf)
        forced = torch.tensor([concept in _forced(self.steps) for concept in steered], device=x.device)
        values = torch.cat([others, changed], dim=1)
        indices = torch.cat([head.indices, torch.tensor(steered, device=x.device).expand(len(x), -1)], dim=1)
        kept = _first(torch.cat([others, changed.masked_fill(forced, math.inf)], dim=1), indices, k)
        kept = kept.gather(1, _first(values.gather(1, kept), indices.gather(1, kept), k))  # forced ones in their order
        return ConceptHead(values.gather(1, kept), indices.gather(1, kept), head.loss)


def _pick(default, values, indices, concepts, n_concepts):
    """The values of some concepts among the kept ones (values, indices [N, k]), `default` [N, n] where a concept is not
    among them; and which of the kept ones they are, bool [N, k]."""
    place = torch.full((n_concepts,), len(concepts), device=indices.device)
    place[concepts] = torch.arange(len(concepts), device=indices.device)
    places = place[indices]
    picked = torch.cat([default, default[:, :1]], dim=1).scatter(1, places, values)  # a last column takes all others
    return picked[:, :-1], places < len(concepts)


def _apply(steps: Steps, logits):
    """The steps of each concept, in the order of ids, on its column of logits [N, n]."""
    columns = []
    for column, concept in zip(logits.unbind(1), sorted(steps), strict=True):
        for step in steps[concept]:
            column = step(column)
        columns.append(column)
    return torch.stack(columns, dim=1)


def _first(values, indices, k):
    """Places [N, k] of the k largest values of each row; ties go to the lowest index."""
    by_index = indices.argsort(dim=1, stable=True)
    order = values.gather(1, by_index).argsort(dim=1, descending=True, stable=True)
    return by_index.gather(1, order)[:, :k]
