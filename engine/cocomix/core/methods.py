"""The methods that can be compared, by the value of `mixing`: what each one's network has, and what people call it.

interleave  CoCoMix (arXiv 2502.08524): concepts are predicted, compressed and interleaved with the hidden states
add         the same, added to the hidden states instead: the sequence keeps its length
predict     concepts are predicted, for their loss alone: nothing is mixed in
pause       one learned vector stands in each concept's place: the doubled sequence without any concepts
none        next-token prediction

With a residual (`concept_residual`), interleave and pause add what stands at a concept position to its token's hidden
state, so that the position begins with what its token has. With `concept_every` m there is a concept position after
every m-th token only.
"""

# What a student may learn from beside its tokens, as messages and the fingerprints in checkpoints name it
CONCEPT_LABELS, SOFT_TARGETS = "labels", "soft targets"
MIXING = ("interleave", "add", "predict", "pause", "none")
_TITLES = {
    "interleave": "CoCoMix",
    "add": "CoCoMix add",
    "predict": "concept prediction",
    "pause": "pause tokens",
    "none": "NTP",
}


def doubles_sequence(mixing: str) -> bool:
    """Whether blocks from `insert_layer` on see two positions a token."""
    return mixing in ("interleave", "pause")


def predicts_concepts(mixing: str) -> bool:
    """Whether there is a concept predictor, which learns from concept labels."""
    return mixing in ("interleave", "add", "predict")


def mixes_concepts(mixing: str) -> bool:
    """Whether predicted concepts go on into the network, through a compress layer."""
    return mixing in ("interleave", "add")


def labels_name(labels_by: str) -> str:
    """What the labels that are picked by this rule are called."""
    return CONCEPT_LABELS if labels_by == "attribution" else f"{CONCEPT_LABELS} by {labels_by}"


def soft_targets_name(top_k: int | None) -> str:
    """What soft targets of so many tokens (None: of all) are called."""
    return f"whole {SOFT_TARGETS}" if top_k is None else f"top-{top_k} {SOFT_TARGETS}"


def method_title(mixing: str, distils: bool = False, residual: bool = False, every: int = 1) -> str:
    """The method's name for people; `distils`: with knowledge distillation beside it; `residual` and `every`: with
    `concept_residual` and `concept_every`, which count where there are concept positions."""
    additions = ["residual"] if residual and doubles_sequence(mixing) else []
    additions += [f"a position every {every} tokens"] if every > 1 and doubles_sequence(mixing) else []
    additions += ["distillation"] if distils else []
    return " with ".join([_TITLES[mixing], " and ".join(additions)]) if additions else _TITLES[mixing]
