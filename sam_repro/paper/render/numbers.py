"""Numbers and tables as text, written the same way everywhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def number(value: float | None, form: str) -> str:
    """A number in a form of Python's, such as ".3g"; a dash for None."""
    return "–" if value is None else format(value, form)


def size(value: float) -> str:
    """Three digits, all of them from 1,000 on: 0.512, 13.5, 107,140."""
    return f"{value:,.0f}" if value >= 999.5 else f"{value:.3g}"


def hours_words(hours: float) -> str:
    """Two digits, all of them from 100 on: 0.073, 12, 4,300."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def markdown_table(
    header: Sequence[str], lines: Iterable[Sequence[object]], *, text_columns: int = 1, padded: bool = False
) -> str:
    """GitHub's Markdown.

    Args:
        text_columns: how many columns, from the left, hold text; numbers are aligned to the right.
        padded: with columns of equal width and without alignment, for a terminal.
    """
    cells = [[" ".join(str(cell).split()).replace("|", r"\|") for cell in line] for line in (header, *lines)]
    if not padded:
        rule = "---|" * text_columns + "--:|" * (len(header) - text_columns)
        first, *others = ("| " + " | ".join(line) + " |" for line in cells)
        return "\n".join([first, "|" + rule, *others])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    padded_cells = ([text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in padded_cells)
