"""CSV and TSV, through the standard library's csv module."""

import csv
import json
from pathlib import Path
from typing import Literal

from fastft.data.formats.base import open_text, reader
from fastft.errors import UserError

# A cell may hold a whole document; csv's own limit is 128 KiB.
csv.field_size_limit(1 << 30)


@reader("csv", ".csv")
def read_csv(path, source):
    return _read(path, source, ",")


@reader("tsv", ".tsv", ".tab")
def read_tsv(path, source):
    return _read(path, source, "\t")


def _read(path, source, usual):
    delimiter = source.delimiter or usual
    quoting: Literal[0, 3] = csv.QUOTE_NONE if source.quoting == "none" else csv.QUOTE_MINIMAL
    with open_text(path, newline="") as f:
        rows = csv.reader(f, delimiter=delimiter, quoting=quoting, strict=True)
        end = 0  # the last line of the row before
        try:
            header = source.header or next(filter(None, rows), None)
            if header is None:
                raise UserError(
                    f"{path}: the file is empty.", "The first line must name the columns, or set header in the source."
                )
            if len(set(header)) != len(header):
                raise UserError(
                    f"{path}:{rows.line_num or 1}: a column name appears twice: {header}.",
                    "Rename one, or set header in the source.",
                )
            if source.header is None and len(header) == 1:
                _check_delimiter(path, header[0], delimiter)
            end = rows.line_num
            for row in rows:
                line, end = end + 1, rows.line_num  # a row with line breaks in it is known by its first line
                if not row:
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{path}:{line}: {len(row)} cells, but the header has {len(header)} columns "
                        f"({', '.join(header)}).",
                        "Quote cells that hold the delimiter; "
                        "if quote characters are plain text here, set quoting: none.",
                    )
                yield f"{path}:{line}", dict(zip(header, row, strict=True))
        except csv.Error as e:
            raise UserError(
                f"{path}:{end + 1}: broken {path.suffix or 'csv'}: {e}",
                "If quote characters are plain text here, set quoting: none in the source.",
            ) from None


def _check_delimiter(path: Path, name: str, delimiter: str) -> None:
    """UserError when a file's only column has a name that another delimiter would divide."""
    for other in ";\t|,":
        if other != delimiter and other in name:
            raise UserError(
                f"{path}: has one column, {name!r}: are its cells separated by {'tab' if other == chr(9) else other}?",
                f"Set delimiter: {json.dumps(other)} in the source: data: {{train: {{path: {path.name}, delimiter: "
                f"{json.dumps(other)}}}}}. If it is one column, name it otherwise, or set header.",
            )
