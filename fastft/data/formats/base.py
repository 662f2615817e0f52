"""What all readers share: the table, opening text (gzip or not), formats by file name."""

import gzip
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fastft.config import Source
from fastft.errors import UserError
from fastft.registry import Registry

Record = Mapping[str, object]
MISSING: Any = object()
Reader = Callable[[Path, Source], Iterator[tuple[str, Record]]]
FORMATS: Registry[Reader] = Registry("data format")
SUFFIXES: dict[str, str] = {}  # ".jsonl" -> "jsonl"


def reader(name: str, *suffixes: str):
    """Register a reader under its name and the file suffixes it takes."""
    for suffix in suffixes:
        SUFFIXES[suffix] = name
    return FORMATS.register(name)


def format_of(path: Path) -> str | None:
    """Format by suffix, seen through .gz; None when unknown."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """UTF-8 text (a byte-order mark is dropped), decompressed when the file is gzip, whatever its name."""
    with open(path, "rb") as f:
        start = f.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16, not UTF-8.", f"Convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW_FILE")
    zipped = start == b"\x1f\x8b"
    return (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline=newline)


def value_of(record: Record, column: str) -> Any:
    """A column's value, ``translation.en`` being the key of a mapping in one; MISSING where there is none."""
    if column in record:
        return record[column]
    name, _, rest = column.partition(".")
    inner = record[name] if rest and name in record else None
    return value_of(inner, rest) if isinstance(inner, Mapping) else MISSING


class Unreadable:
    """A value that its file's library could not turn into a Python one; whoever needs it says so."""

    def __init__(self, reason: str):
        self.reason = reason

    def __repr__(self) -> str:
        return f"<unreadable: {self.reason}>"


class Columns:
    """The columns of an Arrow batch as Python lists, each converted when it is first asked for: a column that nobody
    needs costs nothing, and may hold what Python has no type for.
    """

    def __init__(self, batch: Any):  # a pyarrow RecordBatch or Table
        self.batch, self.names = batch, list(batch.column_names)
        self.known = set(self.names)
        self.converted: dict[str, list] = {}

    def __getitem__(self, name: str) -> list:
        if name not in self.known:
            raise KeyError(name)
        if name not in self.converted:
            self.converted[name] = self._convert(self.batch.column(self.names.index(name)))
        return self.converted[name]

    @staticmethod
    def _convert(column: Any) -> list:
        if str(column.type) in ("float", "halffloat"):  # 0.1, and not 0.10000000149011612, which no file says
            return [None if value is None else float(str(np.float32(value))) for value in column.to_pylist()]
        try:
            return column.to_pylist()
        except (ValueError, OverflowError, ArithmeticError):  # pyarrow's own errors are ValueErrors
            return [_converted(value) for value in column]


def _converted(value: Any) -> object:
    try:
        return value.as_py()
    except (ValueError, OverflowError, ArithmeticError) as e:
        return Unreadable(str(e))


class ArrowRow(Mapping):
    """One row of ``Columns``, as a record."""

    def __init__(self, columns: Columns, row: int):
        self.columns, self.row = columns, row

    def __getitem__(self, name: str) -> object:
        return self.columns[name][self.row]

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns.names)

    def __len__(self) -> int:
        return len(self.columns.names)


def rows_of_batch(batch: Any) -> Iterator[ArrowRow]:
    columns = Columns(batch)
    return (ArrowRow(columns, row) for row in range(batch.num_rows))
