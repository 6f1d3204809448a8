"""The report page and its parts: sections of text, tables and figures as HTML, in which jinja2 escapes all text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cocomix.report.figures import FigureEntry

_TEMPLATES = Environment(
    loader=PackageLoader("cocomix.report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=StrictUndefined,
)
_PARTS = cast(Any, _TEMPLATES.get_template("parts.html.j2").module)  # the template's macros


@dataclass(frozen=True)
class Section:
    """A section of the page, and its figures as they lie beside it: name and PNG bytes."""

    html: Markup
    figures: tuple[tuple[str, bytes], ...] = ()


def page(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """The whole page, which needs nothing beside it."""
    return _TEMPLATES.get_template("report.html.j2").render(title=title, subtitle=subtitle, sections=sections)


def text_section(heading: str, *parts: Markup) -> Section:
    """A heading over what the functions below make."""
    return Section(_PARTS.section(heading, Markup("\n").join(parts)))


def figure_section(entry: FigureEntry, svg: str, png: bytes) -> Section:
    """A figure under its title, with its caption; `svg` is the picture as an element."""
    return Section(_PARTS.figure(entry.title, Markup(svg), entry.caption), ((entry.name, png),))


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> Markup:
    """A table whose first column names its rows."""
    return _PARTS.table(header, rows, kind)


def note(text: str) -> Markup:
    """A paragraph in quiet type."""
    return _PARTS.note(text)


def folded(summary: str, text: str) -> Markup:
    """Preformatted text that opens under a line."""
    return _PARTS.folded(summary, text)
