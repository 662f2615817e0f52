"""CoNLL: a token a line, its columns separated by a tab or by spaces, a blank line after each sentence."""

import re
from collections.abc import Iterator
from pathlib import Path

from fastft.config import Source
from fastft.data.formats.base import Record, open_text, reader
from fastft.errors import UserError

DOCUMENT = "-DOCSTART-"  # CoNLL-2003's line between documents: no token
DEFAULT = ["tokens", "tags"]


@reader("conll", ".conll", ".bio", ".iob")
def read(path: Path, source: Source) -> Iterator[tuple[str, Record]]:
    """A sentence at a time: column name -> list of str, a cell per token.

    ``source.header`` names the file's columns, all of them and in order; without it the first is ``tokens`` and the
    last ``tags``, whatever is between. ``where`` is the sentence's first line. Lines that begin with -DOCSTART- are
    passed over.

    Raises
    ------
    UserError
        A line with another number of columns than the lines before it, or than ``source.header``; a line without a tag.
    """
    header = source.header
    with open_text(path) as f:
        rows: list[list[str]] = []
        start = width = 0
        for number, line in enumerate(f, 1):
            if not line.strip(" \t\r\n") or line.startswith(DOCUMENT):
                if rows:
                    yield f"{path}:{start}", _record(rows, header)
                rows = []
                continue
            cells = _cells(line)
            width = width or (len(header) if header else len(cells))
            _check(f"{path}:{number}", cells, width, header)
            if not rows:
                start = number
            rows.append(cells)
        if rows:
            yield f"{path}:{start}", _record(rows, header)


def _cells(line: str) -> list[str]:
    """By tabs where there are any, so that a token may hold spaces; other white space may be a token."""
    line = line.rstrip("\r\n")
    return (
        [cell.strip(" ") for cell in line.rstrip("\t ").split("\t")]
        if "\t" in line
        else re.split(" +", line.strip(" "))
    )


def _check(where: str, cells: list[str], width: int, header: list[str] | None) -> None:
    if len(cells) == 1 and width != 1:
        raise UserError(
            f"{where}: no tag column: {cells[0]!r} stands alone.", "Give every token its tag, after a tab or a space."
        )
    if len(cells) != width:
        source = f"header names {width} ({', '.join(header)})" if header else f"the lines before have {width}"
        raise UserError(
            f"{where}: {len(cells)} columns, but {source}.",
            "Every line needs the same columns, a tab or spaces between.",
        )
    if header is None and width == 1:
        raise UserError(
            f"{where}: no tag column: the line has one cell.",
            "Give every token its tag, or name the file's columns with header in the source (header: [tokens]).",
        )


def _record(rows: list[list[str]], header: list[str] | None) -> Record:
    if header:
        return {name: [row[i] for row in rows] for i, name in enumerate(header)}
    return {name: [row[i] for row in rows] for name, i in zip(DEFAULT, (0, -1), strict=True)}
