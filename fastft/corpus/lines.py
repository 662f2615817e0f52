"""JSON lines on their way to whoever cleans and tokenizes them: read as bytes, taken apart there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, cast

import numpy as np

from fastft.corpus.files import occurrences
from fastft.corpus.work import Count, Rows
from fastft.data.formats import readable
from fastft.data.formats.base import MISSING, Record, Unreadable, value_of
from fastft.data.formats.jsonl import DEEPEST, parse
from fastft.errors import UserError

TOO_LONG = "longer than max_document_bytes"
SIZE = 1 << 20  # bytes of lines that are worked on together, at least


def _orjson() -> Callable[[bytes], Any] | None:
    try:
        from orjson import loads
    except ImportError:
        return None
    return loads


loads = _orjson()


def checked(value: Any, most: int) -> tuple[str | None, str, str]:
    """The text that a column holds; else None, why it is none, and what the manifest shows of it.

    ``most``: bytes of the longest, in UTF-8.
    """
    if value is MISSING:
        return None, "no such column", ""
    if value is None or (isinstance(value, str) and (not value or value.isspace())):
        return None, "empty", ""
    if isinstance(value, Unreadable) or not isinstance(value, str):
        return None, "not text", str(value)[:100]
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError:
        return None, "half a character", value.encode(errors="replace").decode()[:100]
    return (value, "", "") if size <= most else (None, TOO_LONG, value[:100])


@dataclass
class Lines:
    """Whole lines of a file, one behind the other.

    Attributes
    ----------
    content : bytes
        UTF-8.
    first : int
        The first one's number in the file.
    name, place : str and int
        What the file's rows are called before their number, and which of the source's names that is.
    column : str
        Of the text.
    most : int
        Bytes of the longest text.
    path, at : str and int
        Where the lines are read again by a process of this machine; no path where they do not lie in a file as they
        are.
    too_long : tuple of int
        Numbers of lines that were passed over, and are empty here.
    """

    content: bytes
    first: int
    name: str
    place: int
    column: str
    most: int
    path: str = ""
    at: int = 0
    too_long: tuple[int, ...] = ()

    def here(self) -> Lines | Placed:
        """What stands for them in another process of this machine."""
        return Placed(replace(self, content=b""), len(self.content)) if self.path else self

    def records(self) -> Iterator[tuple[int, Record]]:
        """Number and object of each line that is not blank. UserError for a line that is none."""
        for number, line in enumerate(_ended(self.content).split(b"\n"), self.first):
            record = self._record(number, line)
            if record is not None:
                yield number, record

    def _record(self, number: int, line: bytes) -> Record | None:
        where = f"{self.name}{number}"
        try:
            text = line.decode()
        except UnicodeDecodeError as e:
            raise UserError(f"{where}: is not UTF-8: {e}.", "Set encoding in the source.") from None
        return parse(where, text) if text.strip() else None

    def rows(self) -> tuple[Rows, Count, UserError | None]:
        """Rows that have a text, the count of all, and the error of a broken line: rows end before it."""
        rows, count = Rows(names={self.place: self.name}), Count()
        places, texts, place, column, most = rows.places, rows.texts, self.place, self.column, self.most // 4
        try:
            lines, found = _quickly(_ended(self.content), column, most)
            if None not in found:
                places += zip(repeat(place), range(self.first, self.first + len(found)))
                texts += cast(list[str], found)
                return rows, count, None
            for number, (line, text) in enumerate(zip(lines, found, strict=True), self.first):
                if text is None:
                    record = self._record(number, line)
                    if record is None:
                        if number in self.too_long:
                            count.rows += 1
                            count.drop(f"{self.name}{number}", TOO_LONG, "")
                        continue
                    text, reason, shown = checked(value_of(record, column), self.most)
                    if text is None:
                        count.rows += 1
                        count.drop(f"{self.name}{number}", reason, shown)
                        continue
                places.append((place, number))
                texts.append(text)
        except UserError as e:
            return rows, count, e
        finally:
            count.rows += len(texts)
        return rows, count, None


@dataclass
class Placed:
    """Lines by where they lie. ``size``: in bytes."""

    lines: Lines
    size: int

    def rows(self) -> tuple[Rows, Count, UserError | None]:
        """As ``Lines`` has them. UserError for a file that is not there any more, or is shorter."""
        lines = self.lines
        with readable(lines.path, "jsonl"), open(lines.path, "rb") as f:
            content = os.pread(f.fileno(), self.size, lines.at)
            if len(content) < self.size:
                raise EOFError("it has become shorter")
        return replace(lines, content=content).rows()


def _ended(content: bytes) -> bytes:
    """With the ends of lines that Python's text files have."""
    return content.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in content else content


def lines_in(content: bytes) -> int:
    """How many lines end in it, and the last one if it does not."""
    ends = occurrences(content, b"\n")
    if b"\r" in content:
        ends += occurrences(content, b"\r") - content.count(b"\r\n")
    return ends + (not content.endswith((b"\n", b"\r")))


def cut(read: Callable[[int], bytes]) -> Iterator[bytes]:
    """A file's lines, ``SIZE`` bytes together or a line more: the same whatever ``read`` gives at a time. Those before
    an error come before it.
    """
    held = b""
    try:
        while piece := read(SIZE):
            held += piece
            while (end := held.find(b"\n", SIZE) + 1) > 0:
                yield held[:end]
                held = held[end:]
    except Exception:
        if whole := held.rfind(b"\n") + 1:
            yield held[:whole]
        raise
    if held:
        yield held


def _quickly(content: bytes, column: str, most: int) -> tuple[list[bytes], list[str | None]]:
    """Lines, without a last one that is empty, and the text of each by orjson, where Python's own decoder says the same
    of it; None where it may not (a key twice, of which orjson takes the last), where it is no text or a longer one, and
    where orjson is not there.
    """
    lines = content.split(b"\n")
    if not lines[-1]:
        lines.pop()
    if loads is None:
        return lines, [None] * len(lines)
    try:
        records = list(map(loads, lines))
    except ValueError:
        records = list(map(_loaded, lines))
    values = np.frombuffer(content, np.uint8)
    marks, ends = np.flatnonzero(values == ord('"')), np.flatnonzero(values == ord("\n"))
    counts = np.diff(np.searchsorted(marks, ends), prepend=0, append=len(marks)).tolist()
    return lines, list(map(_text, lines, records, counts, repeat(column), repeat(most)))


def _loaded(line: bytes) -> Any:
    assert loads is not None
    try:
        return loads(line)
    except ValueError:
        return None


def _text(line: bytes, record: Any, marks: int, column: str, most: int) -> str | None:
    """``marks``: quotation marks in the line."""
    if type(record) is not dict or column not in record:
        return None
    text = record[column]
    if type(text) is not str or not text or len(text) > most or text.isspace():
        return None
    wanted = 4
    if len(record) > 1:
        wanted = 2 * len(record)
        for value in record.values():
            if type(value) is str:
                wanted += 2
            elif type(value) is dict or type(value) is list:
                if line.count(b"[") + line.count(b"{") > DEEPEST:
                    return None
                wanted += _quotes(value)
    if marks != wanted and (b'\\\\"' in line or marks - line.count(b'\\"') != wanted):
        return None
    return text


def _quotes(value: dict[str, Any] | list[Any]) -> int:
    """Quotation marks in its JSON, without those in texts."""
    found, values = (2 * len(value), value.values()) if isinstance(value, dict) else (0, value)
    for inner in values:
        if type(inner) is str:
            found += 2
        elif type(inner) is dict or type(inner) is list:
            found += _quotes(inner)
    return found
