"""The page of `cocomix concepts`: one HTML file that needs nothing beside it, with the look of SAE dashboards."""

import html
from string import Template

import numpy as np

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

_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Concepts of $model</title>
<style>
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: #1b1b1b; background: #fff; max-width: 68rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; }
h3 { font-size: 1.02rem; margin: 0 0 .2rem; }
h4 { font-size: .82rem; font-weight: 600; margin: .7rem 0 .2rem; color: #444; }
p { margin: .4rem 0; }
.quiet { color: #555; font-size: .87rem; }
.mono, .strip, .context { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .22rem .6rem; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: nowrap; }
thead th { border-bottom: 1.5px solid #1b1b1b; font-weight: 600; vertical-align: bottom; }
tbody tr { border-bottom: 1px solid #e6e6e6; }
.text { text-align: left; }
.strip { font-size: .8rem; line-height: 1.25; border: 1px solid #ddd; border-radius: 6px; padding: .7rem .6rem; }
.t { display: inline-block; position: relative; vertical-align: top; margin: 0 1px 3px; padding: 0 1px;
  border-radius: 3px; background: rgba(var(--c, 0,0,0), var(--a, 0)); cursor: default; }
.t > b { font-weight: 400; white-space: pre; }
.t > i { display: block; font: .58rem/1.1 system-ui, sans-serif; color: #555; text-align: center; }
.t:hover, .t:focus { outline: 1.5px solid #1b1b1b; }
.tip { display: none; position: absolute; z-index: 2; top: 100%; left: -4px; width: max-content; max-width: 21rem;
  background: #fff; border: 1px solid #777; border-radius: 5px; box-shadow: 0 3px 12px rgba(0,0,0,.25);
  padding: .4rem .6rem; font: .8rem/1.4 system-ui, sans-serif; white-space: normal; }
.t:hover > .tip, .t:focus > .tip { display: block; }
.tip.left { left: auto; right: -4px; }
.tip td, .tip th { padding: .05rem .5rem .05rem 0; }
.window { border: 0; border-top: 1px dashed #999; margin: .5rem 0; }
.chip { display: inline-block; width: .85em; height: .85em; border-radius: 2px; border: 1px solid #777;
  background: rgba(var(--c), .6); margin-right: .35em; vertical-align: -.08em; }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-decoration: underline dotted; text-align: left; }
button[aria-pressed=true] { font-weight: 700; text-decoration: underline; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .8rem 1rem; margin: 0 0 1rem; break-inside: avoid; }
.columns { display: grid; grid-template-columns: 15rem 1fr 1fr; gap: 0 1.5rem; }
.context { font-size: .78rem; white-space: pre-wrap; overflow-wrap: anywhere; margin: .15rem 0;
  padding-left: 3.6rem; text-indent: -3.6rem; }
.context span { color: #555; display: inline-block; width: 3.2rem; margin-right: .4rem; text-indent: 0; }
mark { background: rgba(var(--c), .35); color: inherit; font-weight: 700; border-bottom: 2px solid #1b1b1b; }
.tokens { font-size: .8rem; } .tokens td { padding: .05rem .5rem .05rem 0; }
.tokens td:first-child { white-space: pre; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #444; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 0 2rem; }
@media screen and (max-width: 50rem) { .columns, .pair { grid-template-columns: 1fr; } }
@media print { body { max-width: none; margin: 0; padding: 0; font-size: 9pt; } .tip { display: none !important; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
</style>
</head>
<body>
<header><h1>Concepts of $model</h1>
<p class="quiet">$subtitle</p></header>
$text
<section><h2>Concepts</h2>
$concepts
</section>
<section><h2>One by one</h2>
<p class="quiet">$explanation</p>
$cards
</section>
<section><h2>What the compress layer uses</h2>
$norms
</section>
<script>
// A click on a concept colours the tokens by its weight alone; another click colours them all again.
const tokens = [...document.querySelectorAll(".t")], buttons = [...document.querySelectorAll("button[data-c]")];
for (const button of buttons) button.onclick = () => {
  const chosen = button.getAttribute("aria-pressed") !== "true";
  for (const other of buttons) other.setAttribute("aria-pressed", chosen && other.dataset.c === button.dataset.c);
  for (const token of tokens) {
    const weight = JSON.parse(token.dataset.w)[button.dataset.c] ?? 0;
    token.style.setProperty("--c", chosen ? button.dataset.rgb : token.dataset.c);
    token.style.setProperty("--a", chosen ? weight : token.dataset.a);
    token.querySelector("i").textContent = chosen ? (weight ? button.dataset.c : "\\u00a0") : token.dataset.i;
  }
};
for (const token of tokens) token.onmouseenter = token.onfocus = () => {  // a tooltip never leaves the window
  const tip = token.querySelector(".tip");
  tip.classList.toggle("left", token.getBoundingClientRect().left + 340 > innerWidth);
};
</script>
</body>
</html>
""")

_EXPLANATION = (
    "A card's histogram counts the weights (kept logits) over the corpus. “Points at”: the concept's row of the "
    "compress layer alone through final norm and head, in logits. It is an approximation that skips every block after "
    "the mixing. “Loses without it”: mean probability of the next token in the contexts shown, as the model is and "
    "with the concept's logit set to zero, where the next concept in line takes its place; measured, but there only. "
    "Contexts are the strongest places of the corpus, "
    "at most one from a window; the marked token is the one at which the concept is predicted."
)


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
    return _PAGE.substitute(
        model=html.escape(model),
        subtitle=html.escape(
            f"{len(norms):,} concepts, {surveyed.fired.sum() / surveyed.n_tokens:g} kept at each "
            f"token. Corpus: {surveyed.name}, {surveyed.n_tokens:,} tokens."
        ),
        text="" if reading is None else _text_section(reading, colors, names),
        concepts=_concept_table(reading, cards, surveyed, names, colors),
        explanation=_EXPLANATION,
        cards="\n".join(_card(card, tokenizer, surveyed, names, colors[card.concept], norms) for card in cards),
        norms=_norm_section(norms, surveyed, names),
    )


def visible(text: str) -> str:
    """A token's text with its white space to be seen, escaped."""
    return html.escape(text.replace("\n", "↵").replace("\t", "⇥").replace("\r", "␍")).replace(" ", "·") or "∅"


# --- the text


def _text_section(reading, colors, names):
    left_out = f" The text has {reading.n_left_out:,} tokens more, which are left out." if reading.n_left_out else ""
    notes = (
        f"{len(reading.ids):,} tokens{agreement(reading)}.{left_out} Under each token stands the concept that "
        "makes up most of its continuous concept, and its colour is that concept's, stronger with its share. "
        "Point at a token for the others; click a concept below to see where it is predicted, and how strongly."
    )
    peaks = {concept: reading.weights[reading.concepts == concept].max(initial=0) for concept in colors}
    strongest = max(reading.shares.max(), 1e-9)
    parts = []
    for i in range(len(reading.ids)):
        if i and i % reading.window == 0:
            parts.append('<hr class="window">')
        parts.append(_token(reading, i, colors, names, peaks, strongest))
    return (
        f'<section><h2>The text</h2>\n<p class="quiet">{html.escape(notes)}</p>\n<div class="strip">'
        f"{''.join(parts)}</div></section>"
    )


def _token(reading, i, colors, names, peaks, strongest):
    concepts, weights = reading.concepts[i].tolist(), reading.weights[i].tolist()
    main = int(reading.main[i])
    color = colors.get(main, "120,120,120")  # grey and pale: a concept without a card
    share = (0.7 if main in colors else 0.2) * reading.shares[i].max() / strongest
    below = names.get(main, str(main))[:10]
    weight_of = ",".join(
        f'"{concept}":{max(weight / peaks[concept], 0.05) * 0.75:.2f}' if peaks[concept] > 0 else f'"{concept}":0.05'
        for concept, weight in zip(concepts, weights, strict=True)
        if concept in peaks
    )
    text = reading.tokens[i]
    breaks = "<br>" if "\n" in text else ""
    return (
        f'<span class=t tabindex=0 data-w=\'{{{weight_of}}}\' data-c="{color}" data-a="{share:.2f}" '
        f'data-i="{html.escape(below)}" style="--c:{color};--a:{share:.2f}"><b>{visible(text)}</b>'
        f"<i>{html.escape(below)}</i>{_tip(reading, i, names)}</span>{breaks}"
    )


def _tip(reading, i, names):
    labels = [] if reading.labels is None else [label for label in reading.labels[i].tolist() if label >= 0]
    kept = reading.concepts[i].tolist()
    rows = "".join(
        f"<tr><td>{html.escape(called(concept, names))}{' ✓' if concept in labels else ''}</td><td>{weight:.2f}</td>"
        f"<td>{share:.0%}</td></tr>"
        for concept, weight, share in zip(
            kept[:_TIP_ROWS], reading.weights[i].tolist(), reading.shares[i].tolist(), strict=False
        )
    )
    given = ", ".join(f"{called(label, names)}{' ✓' if label in kept else ''}" for label in labels)
    teacher = "" if reading.labels is None else f"<br>teacher: {html.escape(given) or 'no label'}"
    return (
        f'<span class="tip"><span class="mono">{visible(reading.tokens[i])}</span>: token {i}{teacher}<table>'
        "<thead><tr><th>concept</th><th>weight</th><th>share</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></span>"
    )


# --- the concepts


def _concept_table(reading, cards, surveyed, names, colors):
    header = ["concept", "fires in the corpus", "mean weight", "norm of its row"]
    header += [] if reading is None else ["tokens of the text"]
    header += [] if reading is None or reading.labels is None else ["labelled by the teacher", "of these predicted"]
    rows = []
    for card in cards:
        fired = surveyed.fired[card.concept]
        name = html.escape(called(card.concept, names))
        button = (
            (f'<button data-c="{card.concept}" data-rgb="{colors[card.concept]}" aria-pressed="false">{name}</button>')
            if reading is not None
            else name
        )
        cells = [
            f'<span class="chip" style="--c:{colors[card.concept]}"></span>{button} '
            f'<a href="#concept-{card.concept}">card</a>',
            f"{fired / surveyed.n_tokens:.2%}",
            f"{surveyed.followed[card.concept].total / fired:.2f}" if fired else "–",
            f"{card.norm:.3f}",
        ]
        cells += [] if reading is None else [f"{card.in_text:,}"]
        cells += [] if reading is None or reading.labels is None else [f"{card.labelled:,}", f"{card.agreed:,}"]
        rows.append(cells)
    return _table(header, rows)


def _card(card, tokenizer, surveyed, names, color, norms):
    followed, fired = surveyed.followed[card.concept], surveyed.fired[card.concept]
    rank = int((norms > card.norm).sum()) + 1
    facts = (
        f"kept at {fired:,} of {surveyed.n_tokens:,} tokens ({fired / surveyed.n_tokens:.2%}); norm of its row "
        f"{card.norm:.3f}, number {rank:,} of {len(norms):,}"
    )
    direct = _tokens([(token, f"{logit:.2f}") for token, logit in card.direct])
    measured = _tokens([(token, f"{before:.4f} → {after:.4f}") for token, before, after in card.measured])
    contexts = "\n".join(_context(context, tokenizer) for context in card.contexts)
    return (
        f'<div class="card" id="concept-{card.concept}" style="--c:{color}"><h3><span class="chip"></span>'
        f'{html.escape(called(card.concept, names))}</h3><p class="quiet">{facts}</p><div class="columns">'
        f"<div><h4>Weights in the corpus</h4>{_weights_figure(followed.histogram, color)}</div>"
        f"<div><h4>Points at (approximate)</h4>{direct}</div><div><h4>Loses without it (measured)</h4>{measured}"
        f"</div></div><h4>Strongest contexts</h4>{contexts or 'none in the corpus'}</div>"
    )


def _tokens(rows):
    if not rows:
        return '<p class="quiet">none</p>'
    body = "".join(
        f'<tr><td class="mono">{visible(token)}</td><td>{html.escape(value)}</td></tr>' for token, value in rows
    )
    return f'<table class="tokens"><tbody>{body}</tbody></table>'


def _context(context: Context, tokenizer):
    before, token, after = (
        visible(tokenizer.decode(ids.tolist())) if len(ids) else ""
        for ids in (context.ids[-_TOKENS_BEFORE - 1 : -1], context.ids[-1:], context.after)
    )
    return (
        f'<div class="context"><span>{context.weight:.2f}</span>{_spaced(before)}<mark>{token}</mark>'
        f"{_spaced(after)}</div>"
    )


def _spaced(text):
    return text.replace("·", " ")


def _table(header, rows):
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


# --- figures


def _weights_figure(histogram: Histogram, color):
    filled = np.nonzero(histogram.counts)[0]
    if not len(filled):
        return '<p class="quiet">never kept</p>'
    start, end = filled[0], filled[-1] + 1
    low, high = (histogram.low + edge * histogram.width for edge in (start, end))
    return _bars([(histogram.counts[start:end], f"rgba({color},.75)")], low, high, width=240, height=90)


def _bars(layers, low, high, width, height, label=""):
    """Stacked bars from counts [n] and their fill, over an axis from `low` to `high`, as SVG."""
    total = np.sum([counts for counts, _ in layers], axis=0)
    step, scale = width / len(total), (height - 32) / max(total.max(), 1)
    parts, base = [], np.zeros(len(total))
    for counts, fill in layers:
        for i, count in enumerate(counts):
            if count:
                top, tall = height - 16 - (base[i] + count) * scale, max(count * scale, 0.6)
                parts.append(
                    f'<rect x="{i * step:.1f}" y="{top:.1f}" width="{max(step - 1, 0.5):.1f}" '
                    f'height="{tall:.1f}" fill="{fill}"/>'
                )
        base = base + counts
    axis = (
        f'<line x1="0" x2="{width}" y1="{height - 16}" y2="{height - 16}" stroke="#555"/>'
        f'<text x="0" y="{height - 3}">{low:.2f}</text><text x="{width / 2}" y="{height - 3}" text-anchor="middle">'
        f'{label}</text><text x="{width}" y="{height - 3}" text-anchor="end">{high:.2f}</text>'
        f'<text x="{width}" y="9" text-anchor="end">highest bar: {int(total.max()):,}</text>'
    )
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}{axis}</svg>'


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
    header = ["concept", "norm", "fires in the corpus"]
    largest, smallest = (
        _table(
            header,
            [
                [
                    html.escape(called(concept, names)),
                    f"{norms[concept]:.3f}",
                    f"{surveyed.fired[concept] / surveyed.n_tokens:.2%}",
                ]
                for concept in some.tolist()
            ],
        )
        for some in (order[:_EXTREMES], order[::-1][:_EXTREMES])
    )
    return (
        f'<p class="quiet">{html.escape(words)}</p>{figure}<div class="pair"><div><h4>Used most: the largest rows'
        f"</h4>{largest}</div><div><h4>Used least: the smallest rows</h4>{smallest}</div></div>"
    )
