"""Tables for people: whole at any width. A number is never cut; where a table is too wide for the terminal it is
transposed, and a row takes several lines where that is too wide, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

PIPE = 160  # columns where there is no terminal
FOLDED = 16  # columns that text is given at least before it is folded


def console() -> Console:
    """Standard output; a pipe has no width of its own."""
    return Console() if sys.stdout.isatty() else Console(width=PIPE)


def print_table(
    out: Console,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    title: str | None = None,
    text: Sequence[str] = (),
) -> None:
    """Print cells (rich's markup is read in them) in the first form that fits: a table, one without rules, one with a
    column for every row, or a line for every cell.

    Parameters
    ----------
    text : sequence of str
        Columns that hold prose, which may be folded.
    """
    across = [list(columns), *map(list, rows)]
    down = [list(cells) for cells in zip(*across, strict=True)]
    folded = {i for i, name in enumerate(columns) if name in text}
    cells = [min(n, FOLDED) if i in folded else n for i, n in enumerate(_widths(across))]
    if sum(cells) + 3 * len(cells) + 1 <= out.width:  # a blank on either side of each, and rules between them
        out.print(_table(across, folded, title))
    elif sum(cells) + 2 * (len(cells) - 1) <= out.width:
        out.print(_table(across, folded, title, ruled=False))
    elif not folded and sum(wide := _widths(down)) + 3 * len(wide) + 1 <= out.width:
        out.print(_table(down, set(), title))
    else:
        _print_lines(out, across, title)


def _widths(lines: list[list[str]]) -> list[int]:
    """The widest cell of every column."""
    return [max(map(_cells, column)) for column in zip(*lines, strict=True)]


def _cells(cell: str) -> int:
    return max((line.cell_len for line in Text.from_markup(cell).split("\n")), default=0)


def _table(lines: list[list[str]], folded: set[int], title: str | None, ruled: bool = True) -> Table:
    table = Table(title=title, box=box.HEAVY_HEAD if ruled else None, pad_edge=ruled)
    for i, name in enumerate(lines[0]):
        table.add_column(name, no_wrap=i not in folded, overflow="fold")
    for line in lines[1:]:
        table.add_row(*line)
    return table


def _print_lines(out: Console, lines: list[list[str]], title: str | None) -> None:
    """A block of lines for each row; no line is cut."""
    names, *rows = lines
    width = max(map(_cells, names))
    if title:
        out.print(f"[italic]{escape(title)}[/italic]")
    for row in rows:
        for name, cell in zip(names, row, strict=True):
            indented = cell.replace("\n", f"\n{'':{width + 2}}")
            out.print(f"[bold]{name:{width}}[/bold]  {indented}", highlight=False, soft_wrap=True)
        out.print()
