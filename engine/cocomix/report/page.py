"""Parts of a report page: sections of text, tables and figures as HTML."""

import html
from dataclasses import dataclass

from cocomix.report.figures import FigureEntry


@dataclass(frozen=True)
class Section:
    """A section of the page, and its figures as they lie beside it: name and PNG bytes."""

    html: str
    figures: tuple[tuple[str, bytes], ...] = ()


def text_section(heading: str, content: str) -> Section:
    """A heading (plain text) over HTML."""
    return Section(f"<section>\n<h2>{html.escape(heading)}</h2>\n{content}\n</section>")


def figure_section(entry: FigureEntry, svg: str, png: bytes) -> Section:
    """A figure under its title, with its caption."""
    return Section(
        f'<section class="figure">\n<h2>{html.escape(entry.title)}</h2>\n<figure>\n{svg}\n'
        f"<figcaption>{html.escape(entry.caption)}</figcaption>\n</figure>\n</section>",
        ((entry.name, png),),
    )


def html_table(header: list[str], rows: list[list[str]], kind: str = "numbers") -> str:
    """A table whose first column names its rows. All text is escaped here."""
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in header)
    body = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="{kind}">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n'
        "</table></div>"
    )
