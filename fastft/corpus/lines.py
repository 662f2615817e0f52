"""JSON lines on their way to whoever cleans and tokenizes them: read as bytes, taken apart there."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

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
        for number, line in enumerate(_split(self.content), self.first):
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
            for number, line in enumerate(_split(self.content), self.first):
                text = _quickly(line, column)
                if text is None or len(text) > most:
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


def _split(content: bytes) -> list[bytes]:
    """Lines as Python's text files have them."""
    if b"\r" in content:
        content = content.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return content.split(b"\n")


def lines_in(content: bytes) -> int:
    """How many lines end in it, and the last one if it does not."""
    ends = content.count(b"\n")
    if b"\r" in content:
        ends += content.count(b"\r") - content.count(b"\r\n")
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


def _quickly(line: bytes, column: str) -> str | None:
    """A line's text by orjson, where Python's own decoder says the same of it; None where it may not (a key twice, of
    which orjson takes the last), where it is no text, and where orjson is not there.
    """
    if loads is None or line.count(b"[") + line.count(b"{") > DEEPEST:
        return None
    try:
        record = loads(line)
        text = record[column]
    except (ValueError, KeyError, TypeError):
        return None
    if type(text) is not str or not text or text.isspace():
        return None
    marks, wanted = line.count(b'"'), _quotes(record)
    if marks != wanted and (b'\\\\"' in line or marks - line.count(b'\\"') != wanted):
        return None
    return text


def _quotes(record: dict[str, Any]) -> int:
    """Quotation marks in an object's JSON, without those in texts."""
    found = 2 * len(record)
    for value in record.values():
        if type(value) is str:
            found += 2
        elif type(value) is dict:
            found += _quotes(value)
        elif type(value) is list:
            found += _quotes({str(i): inner for i, inner in enumerate(value)}) - 2 * len(value)
    return found
