"""Tables of text for the terminal."""


def text_table(header: list[str], rows: list[list[str]], align: str | None = None) -> str:
    """A line for the header, one of dashes, and one for each row, two spaces between columns.

    `align` has a letter for each column, "l" or "r"; without it the first column is left-aligned and the others are
    right-aligned.
    """
    align = align or "l" + "r" * (len(header) - 1)
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(_aligned(*cell) for cell in zip(line, widths, align, strict=True)) for line in lines)


def _aligned(cell: str, width: int, side: str) -> str:
    return cell.ljust(width) if side == "l" else cell.rjust(width)
