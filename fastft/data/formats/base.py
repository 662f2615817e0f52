"""What all readers share: the table, opening text (gzip or not), formats by file name."""

import gzip
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, BinaryIO, TextIO, cast

import numpy as np

from fastft.config import Source
from fastft.errors import UserError
from fastft.registry import Registry

Record = Mapping[str, object]
MISSING: Any = object()
Reader = Callable[[Path, Source], Iterator[tuple[str, Record]]]
FORMATS: Registry[Reader] = Registry("data format")
SUFFIXES: dict[str, str] = {}  # ".jsonl" -> "jsonl"
COMPRESSED = (".gz", ".zst")
DATA_EXTRA = "pip install 'fastft[data]'"


def reader(name: str, *suffixes: str):
    """Register a reader under its name and the file suffixes it takes."""
    for suffix in suffixes:
        SUFFIXES[suffix] = name
    return FORMATS.register(name)


def format_of(path: PurePath) -> str | None:
    """Format by suffix, seen through .gz and .zst; None when unknown."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def decompressed(raw: BinaryIO, name: object) -> BinaryIO:
    """What is in a file of gzip or Zstandard, told by its first bytes; else the file itself."""
    start = raw.read(4)
    raw.seek(0)
    if start[:2] == b"\x1f\x8b":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw))
    if start == b"\x28\xb5\x2f\xfd":
        try:
            import zstandard
        except ImportError:
            raise UserError(f"{name}: is Zstandard, and zstandard is not installed.", DATA_EXTRA) from None
        return cast(BinaryIO, io.BufferedReader(_Zstandard(raw, zstandard), 1 << 18))
    return raw


class _Zstandard(io.RawIOBase):
    """Decompresses as it is read. EOFError where the file ends within a frame, which zstandard's own reader does not
    tell; OSError for what is none.
    """

    FED = 1024  # bytes at a time: the most they can become is 32 MiB

    def __init__(self, raw: BinaryIO, library: Any):
        self.raw, self.library = raw, library
        self.frame: Any = None
        self.left, self.ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.ready:
            fed = self.left or self.raw.read(self.FED)
            self.left = b""
            if not fed:
                if self.frame is not None:
                    raise EOFError("the file ends before its Zstandard frame does")
                return 0
            self.frame = self.frame or self.library.ZstdDecompressor().decompressobj()
            try:
                self.ready = memoryview(self.frame.decompress(fed))
            except self.library.ZstdError as e:
                raise OSError(f"broken Zstandard: {e}") from None
            if self.frame.eof:
                self.left, self.frame = self.frame.unused_data, None
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self) -> None:
        self.raw.close()
        super().close()


def open_text(path: Any, newline: str | None = None) -> TextIO:
    """UTF-8 text (a byte-order mark is dropped), decompressed when the file is gzip or Zstandard, whatever its name.

    ``path``: a Path, or what opens itself (``fastft.corpus.files.DataFile``).
    """
    if not isinstance(path, Path):
        return path.open_text(newline)
    with open(path, "rb") as f:
        start = f.read(2)
    if start in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{path}: is UTF-16, not UTF-8.", f"Convert it: iconv -f UTF-16 -t UTF-8 {path} > NEW_FILE")
    if start == b"\x1f\x8b":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline=newline)
    return io.TextIOWrapper(decompressed(open(path, "rb"), path), encoding="utf-8-sig", newline=newline)


def read_whole(path: Any, newline: str | None = None) -> str:
    """The text of a file that is read at once. UserError when it is more than a DataFile allows."""
    most = -1 if isinstance(path, Path) else path.most
    with open_text(path, newline) as f:
        text = f.read(most + 1 if most >= 0 else -1)
    if 0 <= most < utf8_size(text):
        raise UserError(
            f"{path}: is more than {most:,} bytes, and read at once.",
            "Cut it into several files, or write it as jsonl; or raise max_document_bytes.",
        )
    return text


def utf8_size(text: str) -> int:
    """Bytes of a text."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))


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
