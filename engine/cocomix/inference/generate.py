"""`cocomix generate`: text from a model, with concepts amplified, set or forced, and what that changes."""

import contextlib
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cocomix.core.errors import CocomixError
from cocomix.core.output import encodable
from cocomix.inference.concept_names import called, find_concept, read_names
from cocomix.inference.loading import UsableModel, load_teacher, load_usable
from cocomix.inference.steering import SYNTAX, parse_operation, require_concepts, steer, steer_teacher

_COLDEST = 1e-4  # colder, logits over the temperature are no finite numbers
_SHOWN_TOKENS = 8  # gained and lost ones of a comparison


@dataclass(frozen=True)
class Sampling:
    """How to go on: greedily at temperature 0, else by sampling; `beams` above 1 searches."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    beams: int = 1

    def __post_init__(self):
        for holds, message in (
            (self.max_new_tokens >= 1, f"--max-new-tokens is {self.max_new_tokens}: expected at least 1"),
            (
                self.temperature == 0 or _COLDEST <= self.temperature < float("inf"),
                f"--temperature is {self.temperature}: expected 0 (greedy) or at least {_COLDEST}",
            ),
            (0 < self.top_p <= 1, f"--top-p is {self.top_p}: expected a share above 0 and at most 1"),
            (self.top_p == 1 or self.temperature > 0, "--top-p needs sampling: give --temperature too"),
            (self.beams >= 1, f"--beams is {self.beams}: expected at least 1"),
        ):
            if not holds:
                raise CocomixError(message)

    def options(self) -> dict:
        """Arguments of transformers' `generate`."""
        sampled = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return {
            "max_new_tokens": self.max_new_tokens,
            "num_beams": self.beams,
            **(sampled if self.temperature > 0 else {"do_sample": False}),
        }


@dataclass(frozen=True)
class Comparison:
    """One prompt, continued as the model is and steered; distributions are of the token after the prompt."""

    texts: tuple[str, str]
    kl: float  # nats, of the steered distribution from the unsteered one
    mean_kl: float  # the same, over all positions of the prompt
    n_positions: int
    gained: list[tuple[str, float, float]]  # token, probability before and after; the largest changes first
    lost: list[tuple[str, float, float]]


def encode(usable: UsableModel, prompt: str, room: int = 0) -> list[int]:
    """Token ids of a prompt; an empty one starts a document. Raises `CocomixError` where the ids and `room` more do
    not fit into the model's context, and where UTF-8 cannot spell it."""
    tokenizer, context = usable.tokenizer, usable.context
    if not encodable(prompt):
        raise CocomixError(f"the prompt {prompt!r} is not UTF-8: it holds bytes that stand for no character")
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        if tokenizer.eos_token_id is None:
            raise CocomixError("an empty prompt needs a tokenizer with an end-of-text token; give some text")
        ids = [tokenizer.eos_token_id]
    if context is not None and len(ids) + room > context:
        wanted = f" and {room} more are wanted" if room else ""
        advice = "shorten the prompt"
        if len(ids) < context:
            advice = f"ask for at most {context - len(ids)} with --max-new-tokens"
        raise CocomixError(
            f"the prompt has {len(ids)} tokens{wanted}, but the model's context holds {context}: {advice}"
        )
    return ids


@torch.no_grad()
def continue_texts(usable: UsableModel, prompts: list[str], sampling: Sampling) -> list[str]:
    """Every prompt with its continuation, from one left-padded batch. Raises `CocomixError` as `encode` does."""
    model, tokenizer = usable.model, usable.tokenizer
    encoded = [encode(usable, prompt, sampling.max_new_tokens) for prompt in prompts]
    length = max(map(len, encoded))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    ids = torch.tensor([[padding] * (length - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            pad_token_id=padding,
            eos_token_id=tokenizer.eos_token_id,
            **sampling.options(),
        )
    return [
        tokenizer.decode([*row, *new.tolist()], skip_special_tokens=True)
        for row, new in zip(encoded, out[:, length:], strict=True)
    ]


def compare(usable: UsableModel, prompts: list[str], sampling: Sampling, steered: Callable) -> list[Comparison]:
    """Continue prompts as the model is and inside the block that `steered()` opens, from the same random numbers."""
    plain = continue_texts(usable, prompts, sampling)
    with steered():
        changed = continue_texts(usable, prompts, sampling)
    return [
        Comparison(texts, *_next_token(usable, prompt, steered))
        for prompt, texts in zip(prompts, zip(plain, changed, strict=True), strict=True)
    ]


@torch.no_grad()
def _next_token(usable, prompt, steered):
    ids = torch.tensor([encode(usable, prompt)], device=usable.model.device)

    def log_probabilities():
        return usable.model(input_ids=ids, use_cache=False).logits[0].double().log_softmax(-1)

    before = log_probabilities()
    with steered():
        after = log_probabilities()
    kl = (after.exp() * (after - before)).sum(-1).clamp(min=0)
    p, q = before[-1].exp(), after[-1].exp()

    def largest(change):
        top = change.topk(min(_SHOWN_TOKENS, len(change)))
        return [
            (usable.tokenizer.decode([token]), p[token].item(), q[token].item())
            for value, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            if value > 0
        ]

    return kl[-1].item(), kl.mean().item(), len(kl), largest(q - p), largest(p - q)


def parse_steering(texts: Sequence[str], names: dict[int, str]) -> dict[int, str]:
    """{concept: operation} from texts like "4217=3.0"; the concept may be given by its name. Raises `CocomixError`."""
    concepts = {}
    for text in texts:
        concept, equals, operation = text.rpartition("=")
        if not equals:
            raise CocomixError(f"--steer {text}: expected ID=OPERATION: {SYNTAX}")
        number = find_concept(concept, names)
        if number in concepts:
            raise CocomixError(f"--steer names concept {number} twice")
        concepts[number] = str(parse_operation(operation))
    return concepts


def run(
    path,
    prompts: list[str],
    sampling: Sampling,
    steering: Sequence[str] = (),
    comparing: bool = False,
    with_teacher: bool = False,
    teacher_config=None,
) -> None:
    """`cocomix generate`: print the prompts' continuations, or the comparison of steered and unsteered ones.

    Raises `CocomixError` where model, prompts, steering and teacher do not fit each other.
    """
    from cocomix.distributed.ranks import own_device

    if (comparing or with_teacher) and not steering:
        raise CocomixError("--compare shows what steering changes: say with --steer what to change")
    if (with_teacher or teacher_config) and not comparing:
        raise CocomixError("--teacher is compared with the model: give --compare too")
    usable = load_usable(path, own_device())
    names = read_names(usable.names_folder)
    concepts = parse_steering(steering, names)
    if steering:
        require_concepts(usable.model)
    what = ", ".join(f"{called(concept, names)} {operation}" for concept, operation in concepts.items())
    if not comparing:
        with steer(usable.model, concepts) if concepts else contextlib.nullcontext():
            texts = continue_texts(usable, prompts, sampling)
        print("\n\n".join(([f"[steered: {what}]"] if concepts else []) + texts))
        return
    _print_comparisons(
        "model", what, prompts, compare(usable, prompts, sampling, lambda: steer(usable.model, concepts))
    )
    if with_teacher or teacher_config:
        teacher = load_teacher(path, teacher_config, usable)
        _print_comparisons(
            "teacher",
            what,
            prompts,
            compare(usable._replace(model=teacher.model), prompts, sampling, lambda: steer_teacher(teacher, concepts)),
        )


def _print_comparisons(who, what, prompts, comparisons):
    for prompt, comparison in zip(prompts, comparisons, strict=True):
        print(f"=== the {who}, steered: {what}; prompt: {textwrap.shorten(repr(prompt), 60)}")
        print("\n".join(comparison_lines(comparison, shutil.get_terminal_size((100, 24)).columns)), end="\n\n")


def comparison_lines(comparison: Comparison, width: int = 100) -> list[str]:
    """The two texts side by side, then the tokens that gained and lost, in at most `width` columns (40 at least)."""
    width = max(width, 40)
    column = (width - 3) // 2
    texts = [
        ["as it is", "-" * column, *_wrapped(comparison.texts[0], column)],
        ["steered", "-" * column, *_wrapped(comparison.texts[1], column)],
    ]
    lines = _beside(texts[0], texts[1], column)
    over = f"; {comparison.mean_kl:.4f} on average over the prompt's {comparison.n_positions} positions"
    lines += [
        "",
        *textwrap.wrap(
            f"next token after the prompt: KL(steered || as it is) = {comparison.kl:.4f} nats" + over, width
        ),
    ]
    tables = [
        [f"{title:<{column - 18}}{'as it is':>9}{'steered':>9}"]
        + [
            f"{_cut(repr(token), column - 19):<{column - 18}}{before:>9.4f}{after:>9.4f}"
            for token, before, after in tokens
        ]
        for title, tokens in (("gained", comparison.gained), ("lost", comparison.lost))
    ]
    return lines + _beside(tables[0], tables[1], column)


def _wrapped(text, width):
    return [
        part
        for line in text.expandtabs(4).splitlines() or [""]
        for part in textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]
    ]


def _cut(text, width):
    return text if len(text) <= width else text[: width - 1] + "…"


def _beside(left, right, width):
    height = max(len(left), len(right))
    left, right = (lines + [""] * (height - len(lines)) for lines in (left, right))
    return [f"{a:<{width}} | {b}".rstrip() for a, b in zip(left, right, strict=True)]
