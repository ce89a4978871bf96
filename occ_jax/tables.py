"""Tables of text: as Markdown that also lines up on a terminal, and as rich draws them."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def markdown_table(cells: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the header first; the first column to the left, numbers to the right."""
    columns: list[list[str]] = []
    for index, column in enumerate(zip(*cells, strict=True)):
        width = max(map(len, column))
        rule = "-" * width if index == 0 else "-" * (width - 1) + ":"
        texts = [column[0], rule, *column[1:]]
        columns.append([text.rjust(width) if index else text.ljust(width) for text in texts])
    return "\n".join(f"| {' | '.join(row)} |" for row in zip(*columns, strict=True))


def print_table(cells: Sequence[Sequence[str]]) -> None:
    """Draws a table on a terminal; elsewhere, where its width is unknown, prints Markdown."""
    if not sys.stdout.isatty():
        print(markdown_table(cells))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for index, title in enumerate(cells[0]):
        table.add_column(title, justify="right" if index else "left")
    for row in cells[1:]:
        table.add_row(*row)
    Console().print(table)
