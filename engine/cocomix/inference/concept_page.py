"""The page of `cocomix concepts`: one HTML file that needs nothing beside it, with the look of SAE dashboards."""

import json

import numpy as np
from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape

from cocomix.inference.concept_cards import Card
from cocomix.inference.concept_names import called
from cocomix.inference.concept_reading import Reading, agreement, ignored
from cocomix.inference.concept_survey import Context, Histogram, Survey

# Okabe and Ito's colours without black; a concept's id under each token carries the difference on paper.
_COLORS = ("0,114,178", "213,94,0", "0,158,115", "204,121,167", "230,159,0", "86,180,233", "190,170,20", "110,110,110")
_TIP_ROWS = 6  # concepts in the tooltip of a token
_TOKENS_BEFORE = 14  # of a context
_EXTREMES = 10  # rows in the tables of norms
_NORM_BINS = 48


def page(
    model: str,
    tokenizer,
    reading: Reading | None,
    cards: list[Card],
    surveyed: Survey,
    names: dict[int, str],
    norms: np.ndarray,
) -> str:
    """The whole page. `norms` [C] are those of the compress layer's rows; everything else is as
    the other modules of concepts have found it."""
    colors = {card.concept: _COLORS[i % len(_COLORS)] for i, card in enumerate(cards)}
    template = Environment(
        loader=PackageLoader("cocomix.inference"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("concepts.html.j2")
    return template.render(
        model=model,
        subtitle=f"{len(norms):,} concepts, {surveyed.fired.sum() / surveyed.n_tokens:g} kept at each token. "
        f"Corpus: {surveyed.name}, {surveyed.n_tokens:,} tokens.",
        text=None if reading is None else _text_section(reading, colors, names),
        concepts=_concept_table(reading, cards, surveyed, names, colors),
        cards=[_card(card, tokenizer, surveyed, names, colors[card.concept], norms) for card in cards],
        norms=_norm_section(norms, surveyed, names),
    )


def visible(text: str) -> Markup:
    """A token's text with its white space to be seen, escaped."""
    shown = text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍").replace(" ", "·")
    return escape(shown or "∅")


# --- the text


def _text_section(reading, colors, names):
    left_out = f" The text has {reading.n_left_out:,} bytes more, which are left out." if reading.n_left_out else ""
    notes = (
        f"{len(reading.ids):,} tokens{_few(reading)}{agreement(reading)}.{left_out} Under each token stands the "
        "concept that makes up most of its continuous concept, and its colour is that concept's, stronger with its "
        "share. "
        "Point at a token for the others; click a concept below to see where it is predicted, and how strongly."
    )
    peaks = {concept: reading.weights[reading.concepts == concept].max(initial=0) for concept in colors}
    strongest = max(reading.shares.max(), 1e-9)
    tokens = [_token(reading, i, colors, names, peaks, strongest) for i in range(len(reading.ids))]
    return {"notes": notes, "tokens": tokens}


def _few(reading) -> str:
    """How many tokens have a concept position, where not all do."""
    n = int(reading.has_concept.sum())
    return "" if n == len(reading.ids) else f", {n:,} of which have concepts of their own"


def _token(reading, i, colors, names, peaks, strongest):
    concepts, weights = reading.concepts[i].tolist(), reading.weights[i].tolist()
    main = int(reading.main[i])
    color = colors.get(main, "120,120,120")  # grey and pale: a concept without a card
    share = (0.7 if main in colors else 0.2) * reading.shares[i].max() / strongest
    below = names.get(main, str(main))[:10] if main >= 0 else ""
    weight_of = {  # a concept's weight over its largest in the text, pale at least, as the page's script reads it
        str(concept): round(float(max(weight / peaks[concept], 0.05)) * 0.75, 2) if peaks[concept] > 0 else 0.05
        for concept, weight in zip(concepts, weights, strict=True)
        if concept in peaks
    }
    return {
        "number": i,
        "text": visible(reading.tokens[i]),
        "starts_window": i > 0 and i % reading.window == 0,
        "breaks": "\n" in reading.tokens[i],
        "color": color,
        "alpha": f"{share:.2f}",
        "below": below,
        "weight_of": Markup(json.dumps(weight_of)),  # numbers alone
        "teacher": _given_labels(reading, i, names),
        "rows": _tip_rows(reading, i, names),
    }


def _labels(reading, i) -> list[int]:
    return [] if reading.labels is None else [label for label in reading.labels[i].tolist() if label >= 0]


def _given_labels(reading, i, names) -> str | None:
    """The teacher's labels of a token, those that the model keeps ticked; None without a teacher, and where the model
    has no concepts."""
    if reading.labels is None or not reading.has_concept[i]:
        return None
    kept = reading.concepts[i].tolist()
    ticked = [f"{called(label, names)} ✓" if label in kept else called(label, names) for label in _labels(reading, i)]
    return ", ".join(ticked) or "no label"


def _tip_rows(reading, i, names):
    labels = _labels(reading, i)
    rows = []
    for concept, weight, share in zip(
        reading.concepts[i, :_TIP_ROWS].tolist(),
        reading.weights[i, :_TIP_ROWS].tolist(),
        reading.shares[i, :_TIP_ROWS].tolist(),
        strict=True,
    ):
        if concept < 0:
            continue
        tick = " ✓" if concept in labels else ""
        rows.append((called(concept, names) + tick, f"{weight:.2f}", f"{share:.0%}"))
    return rows


# --- the concepts


def _concept_table(reading, cards, surveyed, names, colors):
    header = ["concept", "fires in the corpus", "mean weight", "norm of its row"]
    if reading is not None:
        header += ["tokens of the text"]
    if reading is not None and reading.labels is not None:
        header += ["labelled by the teacher", "of these predicted"]
    rows = []
    for card in cards:
        fired = surveyed.fired[card.concept]
        cells = [
            f"{fired / surveyed.n_tokens:.2%}",
            f"{surveyed.followed[card.concept].total / fired:.2f}" if fired else "–",
            f"{card.norm:.3f}",
        ]
        if reading is not None:
            cells += [f"{card.in_text:,}"]
        if reading is not None and reading.labels is not None:
            cells += [f"{card.labelled:,}", f"{card.agreed:,}"]
        rows.append(
            {
                "concept": card.concept,
                "name": called(card.concept, names),
                "color": colors[card.concept],
                "cells": cells,
            }
        )
    return {"header": header, "rows": rows, "clickable": reading is not None}


def _card(card, tokenizer, surveyed, names, color, norms):
    fired = surveyed.fired[card.concept]
    rank = int((norms > card.norm).sum()) + 1
    return {
        "concept": card.concept,
        "color": color,
        "name": called(card.concept, names),
        "facts": f"kept at {fired:,} of {surveyed.n_tokens:,} tokens ({fired / surveyed.n_tokens:.2%}); norm of its "
        f"row {card.norm:.3f}, number {rank:,} of {len(norms):,}",
        "figure": _weights_figure(surveyed.followed[card.concept].histogram, color),
        "direct": [(visible(token), f"{logit:.2f}") for token, logit in card.direct],
        "measured": [(visible(token), f"{before:.4f} → {after:.4f}") for token, before, after in card.measured],
        "contexts": [_context(context, tokenizer) for context in card.contexts],
    }


def _context(context: Context, tokenizer):
    before, token, after = (
        visible(tokenizer.decode(ids.tolist())) if len(ids) else Markup()
        for ids in (context.ids[-_TOKENS_BEFORE - 1 : -1], context.ids[-1:], context.after)
    )
    return {"weight": f"{context.weight:.2f}", "before": _spaced(before), "token": token, "after": _spaced(after)}


def _spaced(text: Markup) -> Markup:
    return text.replace("·", " ")


# --- figures


def _weights_figure(histogram: Histogram, color):
    filled = np.nonzero(histogram.counts)[0]
    if not len(filled):
        return None
    start, end = filled[0], filled[-1] + 1
    low, high = (histogram.low + edge * histogram.width for edge in (start, end))
    return _bars([(histogram.counts[start:end], f"rgba({color},.75)")], low, high, width=240, height=90)


def _bars(layers, low, high, width, height, label=""):
    """Stacked bars from counts [n] and their fill, over an axis from `low` to `high`, in units of the SVG."""
    total = np.sum([counts for counts, _ in layers], axis=0)
    step, scale = width / len(total), (height - 32) / max(total.max(), 1)
    bars, base = [], np.zeros(len(total))
    for counts, fill in layers:
        for i, count in enumerate(counts):
            if count:
                top, tall = height - 16 - (base[i] + count) * scale, max(count * scale, 0.6)
                bars.append(
                    {
                        "x": f"{i * step:.1f}",
                        "y": f"{top:.1f}",
                        "width": f"{max(step - 1, 0.5):.1f}",
                        "height": f"{tall:.1f}",
                        "fill": fill,
                    }
                )
        base = base + counts
    return {
        "width": width,
        "height": height,
        "bars": bars,
        "low": f"{low:.2f}",
        "high": f"{high:.2f}",
        "label": label,
        "highest": f"{int(total.max()):,}",
    }


def _norm_section(norms, surveyed, names):
    high = float(norms.max()) or 1.0
    fired = surveyed.fired > 0
    used, unused = (np.histogram(norms[which], bins=_NORM_BINS, range=(0, high))[0] for which in (fired, ~fired))
    figure = _bars([(used, "#1b1b1b"), (unused, "#b8b8b8")], 0, high, 860, 170, "norm of the concept's row of W_c")
    small = int(ignored(norms).sum())
    words = (
        f"{fired.sum():,} of {len(norms):,} concepts are kept at least once in the corpus (black), "
        f"{(~fired).sum():,} never (grey). {small:,} rows have less than a tenth of the median norm "
        f"({np.median(norms):.3f}): whatever these concepts' weights, the model ignores them."
    )
    order = np.argsort(-norms, kind="stable")
    largest, smallest = (
        [
            (
                called(concept, names),
                f"{norms[concept]:.3f}",
                f"{surveyed.fired[concept] / surveyed.n_tokens:.2%}",
            )
            for concept in some.tolist()
        ]
        for some in (order[:_EXTREMES], order[::-1][:_EXTREMES])
    )
    return {"words": words, "figure": figure, "largest": largest, "smallest": smallest}
