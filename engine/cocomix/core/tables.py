"""Tables of text for the terminal."""

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str | None = None) -> str:
    """A line for the header, one of dashes, and one for each row, two spaces between columns.

    `align` has a letter for each column, "l" or "r"; without it the first column is left-aligned and the others are
    right-aligned.
    """
    dashes = ["-" * max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return "\n".join(aligned([header, dashes, *rows], align))


def aligned(rows: Sequence[Sequence[str]], align: str | None = None) -> list[str]:
    """The lines of `text_table`, one for each of `rows`, without a header of their own."""
    align = align or "l" + "r" * (len(rows[0]) - 1)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(_padded(*cell) for cell in zip(row, widths, align, strict=True)) for row in rows]


def _padded(cell: str, width: int, side: str) -> str:
    return cell.ljust(width) if side == "l" else cell.rjust(width)
