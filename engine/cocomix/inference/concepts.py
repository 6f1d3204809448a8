"""`cocomix concepts`: which concepts a model predicts in a text, what they do, and which its compress layer uses.

Shapes: n tokens of a text, k kept concepts a token, C concepts, V vocabulary, K labels.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_write
from cocomix.inference.concept_names import add_names, called, find_concept, read_names
from cocomix.inference.concept_survey import Context, Corpus, Survey, survey
from cocomix.inference.loading import UsableModel, load_teacher, load_usable, run_settings
from cocomix.inference.steering import check_concept, require_concepts, steer

_CARDS = 24  # concepts of a text that get a card of their own
_PROMOTED = 8  # tokens that a concept promotes
_IGNORED = 0.1  # a row of the compress layer is ignored below this share of the median norm


@dataclass(frozen=True)
class Reading:
    """The concepts of a text. `shares` are |weight| times the norm of the concept's row of W_c, over their sum at the
    token: how much of the continuous concept each makes up. Labels are -1 where there are fewer than K."""

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
        """The concept that makes up most of the continuous concept at each token, [n]."""
        return np.take_along_axis(self.concepts, self.shares.argmax(1)[:, None], 1)[:, 0]


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
def read_text(usable: UsableModel, text: str, max_tokens: int, teacher=None) -> Reading:
    """Predict concepts for a text, in windows of the model's context as in training, up to `max_tokens`.

    Raises `CocomixError` for a text without tokens.
    """
    model, tokenizer = usable.model, usable.tokenizer
    all_ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if not all_ids:
        raise CocomixError("there is no text to read concepts from")
    ids = torch.tensor(all_ids[:max_tokens], device=model.device)
    kept, labels = [], []
    for window in ids.split(usable.context):
        out = model.base_model(window[None], use_cache=False)
        kept.append((out.concept_indices[0], out.concept_values[0].float()))
        if teacher is not None:
            labels.append(teacher.labels(window[None])[0])
    concepts, weights = (torch.cat(parts) for parts in zip(*kept, strict=True))
    strengths = weights.abs() * compress_norms(model)[concepts]
    shares = strengths / strengths.sum(1, keepdim=True).clamp(min=torch.finfo(strengths.dtype).tiny)
    return Reading(
        ids.cpu().numpy(),
        [tokenizer.decode([i]) for i in ids.tolist()],
        concepts.cpu().numpy(),
        weights.cpu().numpy(),
        shares.cpu().numpy(),
        torch.cat(labels).cpu().numpy() if labels else None,
        usable.context,
        len(all_ids) - len(ids),
    )


def compress_norms(model) -> torch.Tensor:
    """Norm of each concept's row of the compress layer's W_c, float32 [C]: how strongly the model can use it."""
    return torch.linalg.vector_norm(model.base_model.compress_layer.weight.detach().float(), dim=1)


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
    found = [concept for concept, _ in Counter(reading.main.tolist()).most_common(n)] if reading else []
    return list(dict.fromkeys([*wanted, *found]))


def ignored(norms: np.ndarray) -> np.ndarray:
    """Which rows of the compress layer are so small that the model makes no use of them, bool [C]."""
    return norms < _IGNORED * np.median(norms)


@dataclass(frozen=True)
class Request:
    """What `cocomix concepts` was asked for."""

    text_file: str | None = None
    text: str | None = None
    concepts: tuple[str, ...] = ()  # ids or names
    names: tuple[str, ...] = ()  # ID=NAME
    corpus: str | None = None
    corpus_tokens: int = 100_000
    max_tokens: int = 1024
    teacher_config: str | None = None
    out: str = "concepts.html"
    per_token: bool = False

    def read(self) -> str | None:
        """The text itself. Raises `CocomixError` where it cannot be had."""
        if self.text is not None or self.text_file is None:
            return self.text
        if not Path(self.text_file).is_file():
            raise CocomixError(f"there is no file {self.text_file}: name a text file, or give the text with --text")
        try:
            return Path(self.text_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CocomixError(f"{self.text_file} cannot be read as UTF-8 text: {error}") from None


def run(path, request: Request) -> None:
    """`cocomix concepts`: name concepts, print those of a text, and write the page.

    Raises `CocomixError` where model, text, corpus and teacher do not fit each other.
    """
    from cocomix.distributed.ranks import own_device

    if request.text is not None and request.text_file is not None:
        raise CocomixError("there is a text file and --text: give one of them")
    text = request.read()
    if min(request.corpus_tokens, request.max_tokens) < 1:
        raise CocomixError("--corpus-tokens and --max-tokens must be at least 1")
    usable = load_usable(path, own_device())
    require_concepts(usable.model)
    if request.names:
        add_names(usable.names_folder, request.names, usable.model.config.concept_dim)
    names = read_names(usable.names_folder)
    if text is None and not request.concepts:
        if not request.names:
            raise CocomixError("there is nothing to look at: name a text file, or give --text, --concept or --name")
        print("\n".join(called(concept, names) for concept in names) or "no concept has a name")
        return
    wanted = [check_concept(find_concept(one, names), usable.model.config.concept_dim) for one in request.concepts]
    teacher = _teacher(path, request.teacher_config, usable) if text is not None else None
    reading = read_text(usable, text, request.max_tokens, teacher) if text is not None else None
    chosen = chosen_concepts(reading, wanted)
    surveyed = survey(usable.model, _corpus(path, request, usable), chosen)
    cards = [make_card(usable, concept, reading, surveyed) for concept in chosen]
    print(*summary_lines(reading, cards, surveyed, names, request.per_token), sep="\n")
    _write_page(path, request.out, usable, reading, cards, surveyed, names)


def _teacher(path, config_path, usable):
    try:
        return load_teacher(path, config_path, usable)
    except CocomixError as error:
        if config_path is not None:
            raise
        print(f"without the teacher's labels: {error}")
        return None


def _corpus(path, request, usable):
    place = request.corpus
    if place is None:
        data = (run_settings(path) or {}).get("data") or {}
        place = data.get("folder")
        if place is None or not (Path(place) / "meta.json").is_file():
            place = request.text_file
    if place is None:
        raise CocomixError("there is no corpus to look for contexts in: name text or token files with --corpus")
    return Corpus(place, usable.tokenizer, usable.context, request.corpus_tokens)


def _write_page(path, out, usable, reading, cards, surveyed, names):
    from cocomix.inference.concept_page import page

    norms = compress_norms(usable.model).cpu().numpy()
    content = page(str(path), usable.tokenizer, reading, cards, surveyed, names, norms)
    with atomic_write(out) as file:
        file.write(content.encode("utf-8", errors="replace"))
    print(f"page: {out}")


def summary_lines(reading, cards, surveyed, names, per_token: bool = False) -> list[str]:
    """What the terminal shows: the text's tokens (`per_token`), its main concepts, and what they do in the corpus."""
    lines = []
    if reading is not None:
        lines += _token_lines(reading, names) if per_token else []
        left_out = f" (its first; {reading.n_left_out:,} more were left out)" if reading.n_left_out else ""
        lines.append(
            f"{len(reading.ids):,} tokens of text{left_out}, {len(set(reading.concepts.ravel().tolist())):,} "
            f"concepts in it{agreement(reading)}"
        )
    lines += ["", f"{'concept':<24}{'in the text':>12}{'in the corpus':>15}{'mean weight':>13}  promotes"]
    for card in cards:
        fired, followed = surveyed.fired[card.concept], surveyed.followed[card.concept]
        weight = f"{followed.total / fired:.2f}" if fired else "–"
        promoted = " ".join(repr(token) for token, *_ in (card.measured or card.direct)[:4])
        in_text = str(card.in_text) if reading is not None else "–"
        lines.append(
            f"{called(card.concept, names):<24}{in_text:>12}{fired / surveyed.n_tokens:>15.2%}{weight:>13}  {promoted}"
        )
    return lines


def agreement(reading: Reading) -> str:
    """How many of the teacher's labels are among the predicted concepts, in words; nothing without labels."""
    if reading.labels is None or not (reading.labels >= 0).any():
        return ""
    given = reading.labels >= 0
    found = (reading.labels[:, :, None] == reading.concepts[:, None, :]).any(2) & given
    return f"; {found.sum():,} of the teacher's {given.sum():,} labels are among them ({found.sum() / given.sum():.0%})"


def _token_lines(reading, names, n=4):
    lines = []
    for i, token in enumerate(reading.tokens):
        kept = "  ".join(
            f"{called(concept, names)} {weight:.2f}"
            for concept, weight in zip(reading.concepts[i, :n].tolist(), reading.weights[i, :n].tolist(), strict=True)
        )
        labels = [] if reading.labels is None else [label for label in reading.labels[i].tolist() if label >= 0]
        lines.append(
            f"{token!r:<18} {kept}"
            + (f"  | labels: {', '.join(called(label, names) for label in labels)}" if labels else "")
        )
    return [*lines, ""]
