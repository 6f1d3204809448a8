"""`cocomix concepts`: which concepts a model predicts in a text, what they do, and which its compress layer uses."""

from dataclasses import dataclass
from pathlib import Path

from cocomix.core.errors import CocomixError
from cocomix.core.files import atomic_write, sweep_leftovers
from cocomix.core.output import encodable, note_once
from cocomix.distributed.export import run_of
from cocomix.distributed.ranks import own_device
from cocomix.inference.concept_cards import chosen_concepts, make_card
from cocomix.inference.concept_names import add_names, called, find_concept, read_names
from cocomix.inference.concept_page import page
from cocomix.inference.concept_reading import agreement, compress_norms, read_text
from cocomix.inference.concept_survey import Corpus, survey
from cocomix.inference.loading import load_teacher, load_usable
from cocomix.inference.steering import check_concept, require_concepts
from cocomix.training.run_places import find_data

_LONGEST_TOKEN = 128  # characters, of nearly all


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

    def read(self) -> tuple[str | None, int | None]:
        """The text, of a file as much of its beginning as `max_tokens` can need, and the bytes of all of it where there
        may be more. Raises `CocomixError` where it cannot be had."""
        if self.text is not None and not encodable(self.text):
            raise CocomixError("--text is not UTF-8: it holds bytes that stand for no character")
        if self.text is not None or self.text_file is None:
            return self.text, None
        path = Path(self.text_file)
        if not path.is_file():
            raise CocomixError(f"there is no file {self.text_file}: name a text file, or give the text with --text")
        try:
            with open(path, encoding="utf-8", newline="") as file:
                return file.read(_LONGEST_TOKEN * (self.max_tokens + 1024)), path.stat().st_size
        except (OSError, UnicodeDecodeError) as error:
            raise CocomixError(f"{self.text_file} cannot be read as UTF-8 text: {error}") from None


def run(path, request: Request) -> None:
    """`cocomix concepts`: name concepts, print those of a text, and write the page.

    Raises `CocomixError` where model, text, corpus and teacher do not fit each other.
    """
    if request.text is not None and request.text_file is not None:
        raise CocomixError("there is a text file and --text: give one of them")
    text, n_bytes = request.read()
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
    reading = read_text(usable, text, request.max_tokens, teacher, n_bytes) if text is not None else None
    chosen = chosen_concepts(reading, wanted)
    surveyed = survey(usable.model, _corpus(path, request, usable), chosen)
    cards = [make_card(usable, concept, reading, surveyed) for concept in chosen]
    _write_page(path, request.out, usable, reading, cards, surveyed, names)  # before what nobody may read to its end
    print(*summary_lines(reading, cards, surveyed, names, request.per_token), f"page: {request.out}", sep="\n")


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
        place = _data_of_run(path) or request.text_file
    if place is None:
        raise CocomixError("there is no corpus to look for contexts in: name text or token files with --corpus")
    return Corpus(place, usable.tokenizer, usable.context, request.corpus_tokens)


def _data_of_run(path) -> str | None:
    run = run_of(path)
    try:
        place = None if run is None else find_data(run, "--corpus")
    except CocomixError as error:
        note_once(f"without the run's own text: {error}")
        return None
    return place if place is not None and (Path(place) / "meta.json").is_file() else None


def _write_page(path, out, usable, reading, cards, surveyed, names):
    norms = compress_norms(usable.model).cpu().numpy()
    content = page(str(path), usable.tokenizer, reading, cards, surveyed, names, norms)
    sweep_leftovers(Path(out).parent, Path(out).name)
    with atomic_write(out) as file:
        file.write(content.encode("utf-8", errors="replace"))


def summary_lines(reading, cards, surveyed, names, per_token: bool = False) -> list[str]:
    """What the terminal shows: the text's tokens (`per_token`), its main concepts, and what they do in the corpus."""
    lines = []
    if reading is not None:
        lines += _token_lines(reading, names) if per_token else []
        left_out = f" (its first; {reading.n_left_out:,} bytes more were left out)" if reading.n_left_out else ""
        there = reading.concepts[reading.has_concept]
        few = "" if reading.has_concept.all() else f", {len(there):,} of them with concepts"
        lines.append(
            f"{len(reading.ids):,} tokens of text{left_out}{few}, {len(set(there.ravel().tolist())):,} "
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


def _token_lines(reading, names, n=4):
    lines = []
    for i, token in enumerate(reading.tokens):
        kept = "  ".join(
            f"{called(concept, names)} {weight:.2f}"
            for concept, weight in zip(reading.concepts[i, :n].tolist(), reading.weights[i, :n].tolist(), strict=True)
            if concept >= 0
        )
        labels = [] if reading.labels is None else [label for label in reading.labels[i].tolist() if label >= 0]
        lines.append(
            f"{token!r:<18} {kept}"
            + (f"  | labels: {', '.join(called(label, names) for label in labels)}" if labels else "")
        )
    return [*lines, ""]
