"""Rows of a corpus's sources in blocks, from any block on."""

from __future__ import annotations

import codecs
from collections.abc import Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, TypeVar, cast

from fastft.config.corpus import CorpusConfig
from fastft.corpus import lines
from fastft.corpus.files import DataFile
from fastft.corpus.lines import TOO_LONG, Lines, checked, cut, lines_in
from fastft.corpus.work import Count, Rows
from fastft.data import formats
from fastft.data.formats.base import MISSING, value_of
from fastft.data.prepared import split_where
from fastft.errors import UserError, did_you_mean

BLOCK_ROWS = 1000
BLOCK_CHARACTERS = 1 << 20
T = TypeVar("T")
LOOKED = 100  # first rows of a file of which one must have the column


@dataclass
class Position:
    """Up to where the sources are read: file of a source, and records of it."""

    source: int = 0
    file: int = 0
    records: int = 0


@dataclass
class Block:
    """Rows of one source that follow each other, and what became of those that are no text.

    Attributes
    ----------
    source, file : int
        The file is that of the first row.
    end : Position
        Where the next block begins.
    read : Count
        Rows, and those that have no text.
    broken : dict of str
        File -> why it was left before its end.
    empty : list of str
        Files without a row.
    """

    rows: Rows | Lines
    source: int
    file: int
    end: Position
    read: Count = field(default_factory=Count)
    broken: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)


class Reader:
    """Reads the sources one after the other. The same files give the same blocks, whoever asks and from where.

    Parameters
    ----------
    files : list of list of DataFile
        Of each source.
    names : list of list of str
        What places are called, by source: grown as files are read.
    """

    def __init__(self, config: CorpusConfig, files: list[list[DataFile]], names: list[list[str]]):
        self.config, self.files, self.names = config, files, names
        self.current: DataFile | None = None

    def blocks(self, start: Position) -> Iterator[Block]:
        for source in range(start.source, len(self.files)):
            at = start if source == start.source else Position(source)
            yield from self._of_source(source, at)

    def _of_source(self, number: int, at: Position) -> Iterator[Block]:
        names = _Names(self.names[number])
        rows = _Rows(self, number, at, names)
        for file_number in range(at.file, len(self.files[number])):
            file = self.current = self.files[number][file_number]
            file.too_long.clear()
            passed = at.records if file_number == at.file else 0
            if file.format != "jsonl" or not file.utf8:
                yield from rows.of_file(file_number, passed)
                continue
            broken = dict[str, str]()
            chunks = _to_the_fault(_chunks(file), file, self.config, broken)
            start = list(islice(chunks, 2))
            if len(start) < 2 and sum(map(len, start)) < lines.SIZE // 4 and not broken:  # not worth a block of its own
                yield from rows.of_small(file_number, b"".join(start))
                continue
            yield from rows.rest(file_number)
            yield from self._lines(number, file_number, passed, names, chain(start, chunks), broken)
            rows = _Rows(self, number, Position(number, file_number + 1), names)
        yield from rows.rest(len(self.files[number]))

    def _lines(
        self,
        number: int,
        file_number: int,
        passed: int,
        names: _Names,
        chunks: Iterable[bytes],
        broken: dict[str, str],
    ) -> Iterator[Block]:
        """A file of JSON lines, as bytes: who works on them takes them apart. ``passed``: lines that are done."""
        file, column = self.files[number][file_number], self.config.sources[number].text
        name, first, at, place = f"{file}:", 1, 0, None
        look, as_it_lies = _Column(column), True
        for content in chunks:
            if first == 1 and content.startswith(codecs.BOM_UTF8):
                content, at = content[3:], 3
            behind = first + lines_in(content)
            as_it_lies = as_it_lies and file.as_it_lies and not file.too_long
            path = file.where if as_it_lies else ""
            long = _taken(file.too_long, behind)
            if not content.isspace() or long:
                place = names.place(name)
                part = Lines(content, first, name, place, column, self.config.max_document_bytes, path, at, long)
                look.look_at(part, self.config.unreadable == "error")
                if first > passed:
                    yield Block(part, number, file_number, Position(number, file_number, behind - 1))
            first, at = behind, at + len(content)
        look.end()
        last = Block(Rows(), number, file_number, Position(number, file_number + 1), broken=broken)
        _passed_over(file, last)
        if place is None and not broken and not last.read.rows:
            last.empty.append(file.where)
        yield last


class _Names:
    """What the files of a source are called in places, in the order in which they came up."""

    def __init__(self, names: list[str]):
        self.names, self.known = names, {name: i for i, name in enumerate(names)}

    def place(self, name: str) -> int:
        place = self.known.setdefault(name, len(self.names))
        if place == len(self.names):
            self.names.append(name)
        return place


class _Rows:
    """Blocks of rows of files that are taken apart here; one block may hold several files."""

    def __init__(self, reader: Reader, source: int, at: Position, names: _Names):
        self.config, self.files, self.names = reader.config, reader.files[source], names
        self.number, self.source = source, reader.config.sources[source]
        self._begin(at)

    def _begin(self, at: Position) -> None:
        self.rows, self.characters = Rows(), 0
        self.block = Block(self.rows, self.number, at.file, at)

    def of_file(self, number: int, passed: int) -> Iterator[Block]:
        """``passed``: records that are done."""
        file, source, rows = self.files[number], self.source, self.rows
        records, broken = 0, dict[str, str]()
        name, place = "", 0
        column = _Column(source.text)
        for where, record in _to_the_fault(formats.read_file(file, source), file, self.config, broken):
            records += 1
            column.look(where, record)
            if records <= passed:
                continue
            rest = where[len(name) :]
            if name and where.startswith(name) and rest.isdecimal():  # as of the row before
                row = int(rest)
            else:
                name, row = split_where(where)
                place = self.names.place(name)
            self.block.read.rows += 1
            text, reason, shown = checked(value_of(record, source.text), self.config.max_document_bytes)
            if text is None:
                self.block.read.drop(where, reason, shown)
            else:
                rows.places.append((place, row))
                rows.texts.append(text)
                rows.names[place] = name
                self.characters += len(text)
            if self._full():
                self.block.end = Position(self.number, number, records)
                yield self.block
                self._begin(self.block.end)
                rows = self.rows
        column.end()
        self.block.broken |= broken
        self._end(number, bool(records or broken))

    def of_small(self, number: int, content: bytes) -> Iterator[Block]:
        """``content``: all lines of a file of JSON lines."""
        file, column, block = self.files[number], self.source.text, self.block
        content, error = content.removeprefix(codecs.BOM_UTF8), None
        long = _taken(file.too_long, 1 + lines_in(content) if content else 1)
        if content.strip() or long:
            name = f"{file}:"
            most = self.config.max_document_bytes
            part = Lines(content, 1, name, self.names.place(name), column, most, too_long=long)
            look = _Column(column)
            look.look_at(part, self.config.unreadable == "error")
            look.end()
            found, read, error = part.rows()
            self.rows.places += found.places
            self.rows.texts += found.texts
            self.rows.names |= found.names
            self.characters += sum(map(len, found.texts))
            block.read.add(read)
            if error is not None:
                block.broken[file.where] = fault(error, self.config)
                file.too_long.clear()  # behind the fault
        self._end(number, bool(content.strip() or long))
        if self._full():
            yield block
            self._begin(block.end)

    def _full(self) -> bool:
        return len(self.rows.texts) >= BLOCK_ROWS or self.characters >= BLOCK_CHARACTERS

    def _end(self, number: int, held: bool) -> None:
        """Of a file. ``held``: it is not empty."""
        file = self.files[number]
        if not held and not file.too_long:
            self.block.empty.append(file.where)
        _passed_over(file, self.block)
        self.block.end = Position(self.number, number + 1, 0)

    def rest(self, file: int) -> Iterator[Block]:
        """What is begun, before this file; the source's number is over behind its last file."""
        over = file == len(self.files)
        self.block.end = Position(self.number + 1) if over else Position(self.number, file)
        if over or self.block.read.rows or self.block.broken or self.block.empty:
            yield self.block


class _Column:
    """Whether the first rows of a file have the column: one of them must, or it is not this file's."""

    def __init__(self, name: str):
        self.name = name
        self.first: tuple[str, Any] | None = None
        self.looked = 0
        self.known = False

    def look(self, where: str, record: Any) -> None:
        if self.known:
            return
        self.known = value_of(record, self.name) is not MISSING
        self.first = self.first or (where, record)
        self.looked += 1
        if self.looked == LOOKED:
            self.end()

    def look_at(self, part: Lines, strict: bool) -> None:
        """``strict``: a line that is none is an error, which whoever works on the lines finds again."""
        records = part.records()
        while not self.known:
            try:
                number, record = next(records)
            except StopIteration:
                return
            except UserError:
                if not strict:
                    self.end()
                self.known = True
                return
            self.look(f"{part.name}{number}", record)

    def end(self) -> None:
        """UserError where none has."""
        if self.first is None or self.known:
            return
        where, record = self.first
        raise UserError(
            f"{where}: no column {self.name!r}, nor in any of the rows behind it.",
            f"{did_you_mean(self.name, list(record))} Set text to the column in the source.",
        )


def _chunks(file: DataFile) -> Iterator[bytes]:
    """A file's whole lines, some together."""
    with formats.readable(file, "jsonl"), file.open_bytes() as f:
        yield from cut(f.raw.read1)  # without the copies of what buffers it


def _to_the_fault(parts: Iterator[T], file: DataFile, config: CorpusConfig, broken: dict[str, str]) -> Iterator[T]:
    """What is read of a file; where it cannot be read on, it ends, if that was asked for, and is ``broken``."""
    try:
        with closing(cast(Generator[T], parts)):
            yield from parts
    except UserError as e:
        broken[file.where] = fault(e, config)


def fault(error: UserError, config: CorpusConfig) -> str:
    """What is said of a file that cannot be read on, where that was asked for; else raises."""
    if config.unreadable == "error":
        hint = "Or leave out what is behind the fault: unreadable: skip."
        raise UserError(error.message, f"{error.hint} {hint}".strip()) from None
    return error.message


def _taken(numbers: list[int], before: int) -> tuple[int, ...]:
    """Those before a number, which are then no more in the list."""
    found = tuple(number for number in numbers if number < before)
    numbers[:] = [number for number in numbers if number >= before]
    return found


def _passed_over(file: DataFile, block: Block) -> None:
    """Count the lines that were too long to be held; at the end, for a file is read ahead of its rows."""
    for line in file.too_long:
        block.read.rows += 1
        block.read.drop(f"{file}:{line}", TOO_LONG, "")
    file.too_long.clear()
