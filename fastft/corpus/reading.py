"""Rows of a corpus's sources in blocks, from any block on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from fastft.config.corpus import CorpusConfig, CorpusSource
from fastft.corpus.files import DataFile
from fastft.corpus.work import Count, Place, Rows
from fastft.data import formats
from fastft.data.formats.base import MISSING, Unreadable, value_of
from fastft.data.prepared import split_where
from fastft.errors import UserError, did_you_mean

BLOCK_ROWS = 1000
BLOCK_CHARACTERS = 1 << 20
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
    source : int
    end : Position
        Where the next block begins.
    read : Count
        Rows, and those that have no text.
    broken : dict of str
        File -> why it was left before its end.
    empty : list of str
        Files without a row.
    """

    rows: Rows
    source: int
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
        source, names = self.config.sources[number], self.names[number]
        known = {name: i for i, name in enumerate(names)}
        block, characters = Block(Rows(), number, at), 0
        for file_number in range(at.file, len(self.files[number])):
            file = self.current = self.files[number][file_number]
            passed = at.records if file_number == at.file else 0
            records, broken, before = 0, dict[str, str](), block.read.rows
            name, place = "", 0
            column = _Column(source.text)
            for where, record in _records(file, source, self.config, broken):
                records += 1
                column.look(where, record, records)
                if records <= passed:
                    continue
                rest = where[len(name) :]
                if name and where.startswith(name) and rest.isdecimal():  # as of the row before
                    row = int(rest)
                else:
                    name, row = split_where(where)
                    place = known.setdefault(name, len(known))
                    if place == len(names):
                        names.append(name)
                text = self._text(where, record, source, block.read)
                if text is not None:
                    _add(block.rows, (place, row), where, text)
                    characters += len(text)
                if len(block.rows.texts) >= BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
                    block.end = Position(number, file_number, records)
                    yield block
                    block, characters = Block(Rows(), number, block.end), 0
            column.end()
            _passed_over(file, block)
            block.broken |= broken
            if not records and not broken and block.read.rows == before:
                block.empty.append(file.where)
            block.end = Position(number, file_number + 1, 0)
        block.end = Position(number + 1)
        yield block

    def _text(self, where: str, record: Any, source: CorpusSource, count: Count) -> str | None:
        """The text of a row; None where it has none, which is counted."""
        count.rows += 1
        value = value_of(record, source.text)
        if value is MISSING:
            count.drop(where, "no such column", "")
        elif value is None or (isinstance(value, str) and (not value or value.isspace())):
            count.drop(where, "empty", "")
        elif isinstance(value, Unreadable) or not isinstance(value, str):
            count.drop(where, "not text", str(value)[:100])
        else:
            try:
                size = len(value) if value.isascii() else len(value.encode())
            except UnicodeEncodeError:
                count.drop(where, "half a character", value.encode(errors="replace").decode()[:100])
                return None
            if size <= self.config.max_document_bytes:
                return value
            count.drop(where, "longer than max_document_bytes", value[:100])
        return None


class _Column:
    """Whether the first rows of a file have the column: one of them must, or it is not this file's."""

    def __init__(self, name: str):
        self.name = name
        self.first: tuple[str, Any] | None = None
        self.there = False

    def look(self, where: str, record: Any, number: int) -> None:
        if self.there or number > LOOKED:
            return
        self.there = value_of(record, self.name) is not MISSING
        self.first = self.first or (where, record)
        if number == LOOKED:
            self.end()

    def end(self) -> None:
        """UserError where none has."""
        if self.first is None or self.there:
            return
        where, record = self.first
        raise UserError(
            f"{where}: no column {self.name!r}, nor in any of the rows behind it.",
            f"{did_you_mean(self.name, list(record))} Set text to the column in the source.",
        )


def _records(
    file: DataFile, source: CorpusSource, config: CorpusConfig, broken: dict[str, str]
) -> Iterator[tuple[str, Any]]:
    """A file's records; where it cannot be read on, it ends, if that was asked for, and is among the ``broken``."""
    try:
        with closing(formats.read_file(file, source)) as records:  # type: ignore[type-var]
            yield from records
    except UserError as e:
        if config.unreadable == "error":
            hint = "Or leave out what is behind the fault: unreadable: skip."
            raise UserError(e.message, f"{e.hint} {hint}".strip()) from None
        broken[file.where] = e.message


def _passed_over(file: DataFile, block: Block) -> None:
    """Count the lines that were too long to be held; at the end, for a file is read ahead of its rows."""
    for line in file.too_long:
        block.read.rows += 1
        block.read.drop(f"{file}:{line}", "longer than max_document_bytes", "")
    file.too_long.clear()


def _add(rows: Rows, place: Place, where: str, text: str) -> None:
    rows.places.append(place)
    rows.where.append(where)
    rows.texts.append(text)
