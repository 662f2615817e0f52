"""The rows of a split through its encoder, in one process or several: the columns are the same."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

import numpy as np

from fastft.config import Source
from fastft.data import formats
from fastft.data.encoder import Counts, Encoder, Example, Learned, RowError
from fastft.data.store import RAGGED, Store
from fastft.errors import UserError
from fastft.processes import Copies, in_order

REFUSED = 1000  # rows that cannot be used, until reading on tells nothing more
ROWS = 1000  # handed to an encoder at a time: enough for a tokenizer's threads, small enough for memory
SENT = 1 << 23  # bytes, about, that another process is handed at a time: fewer rows where they are long
Read = tuple[str, formats.Record | UserError]  # where, and what
Chunk = list[Read]
Numbered = tuple[int, str, formats.Record]  # of a chunk: its place there, where it was read, the record
Encoded = tuple[list[Example], Counts, list[tuple[int, RowError]], Counter[str]]


def encode(
    folder: Path,
    encoder: Encoder,
    sources: Sequence[Source],
    learned: Learned | None,
    apart: bool = False,
    workers: int | None = 1,
) -> dict:
    """Write the columns of a split into a folder; returns its meta: the same however many processes encode.

    Parameters
    ----------
    apart : bool
        Whether the meta says where each source begins.
    workers : int or None
        Processes that encode; None: as many as this one has cores.
    """
    counts, store, refused = Counts(), Store(folder, encoder.columns), _Refused()
    with closing(_Encoding(encoder, counts, refused, workers)) as encoding:
        for part in [[source] for source in sources] if apart else [sources]:
            store.starts.append(store.examples)
            for example in encoding.examples(_read(part, encoder, counts)):
                store.append(example.where, example.columns, example.extra)
    refused.check()
    origins = store.close()
    encoder.settle(counts)
    meta = encoder.finish(store, learned)
    dtypes = {"dtypes": found} if (found := store.dtypes()) else {}
    begins = {"sources": store.starts} if apart else {}
    return {"counts": counts.as_dict(), "origins": origins, **dtypes, **begins, **meta}


class _Encoding:
    """Rows to examples: those of the first chunk in this process, those behind it in copies of it, which have at hand
    what the first one has loaded, and are sent the columns that it looked at.
    """

    def __init__(self, encoder: Encoder, counts: Counts, refused: _Refused, workers: int | None):
        self.encoder, self.counts, self.refused = encoder, counts, refused
        self.workers = workers or len(os.sched_getaffinity(0))
        self.sums = Counter[str]()
        self.looked_at: set[str] = set()
        self.begun = False
        self.pool: Copies | None = None
        self.rows = ROWS  # of a chunk

    def examples(self, rows: Iterator[Read]) -> Iterator[Example]:
        chunks = iter(lambda: list(islice(rows, self.rows)), [])
        if not self.begun or self.workers == 1 or not self.encoder.alone:
            for chunk in chunks:
                several = self.workers > 1 and self.encoder.alone
                self.begun = True
                yield from self._take(chunk, self._work(_numbered(chunk, self.looked_at if several else None)))
                if several:
                    break
        for chunk in chunks:  # there are more
            self.pool = self.pool or Copies(self._portable, self.workers, "Where memory is short, set data.workers: 1.")
            for whole, done in in_order(chain([chunk], chunks), self.pool, self._sent):
                if done is None:
                    done = self._work(_numbered(whole, self.looked_at))
                yield from self._take(whole, done)

    def _sent(self, chunk: Chunk) -> list[Numbered]:
        """Rows as they are sent: plain ones, for a row of an Arrow batch has all of the batch with it."""
        rows = _numbered(chunk, None)
        plain: list[Numbered] = [(n, where, _Sent(record, self.looked_at)) for n, where, record in rows]
        self.rows = max(1, min(ROWS, len(chunk) * SENT // len(pickle.dumps(plain, protocol=5))))
        return plain

    def _work(self, rows: list[Numbered]) -> Encoded:
        counts, refused = Counts(), list[tuple[int, RowError]]()
        self.encoder.sums = Counter()
        return _encoded(rows, self.encoder, counts, refused), counts, refused, self.encoder.sums

    def _portable(self, rows: list[Numbered]) -> Encoded | None:
        """In a copy: sequences as arrays, which pickle well; None where a column would be needed that was not sent."""
        try:
            done = self._work(rows)
        except _NotSent:
            return None
        for name, kind in self.encoder.columns.items():
            if kind.startswith(RAGGED):
                for example in done[0]:
                    example.columns[name] = np.asarray(example.columns[name], kind.removeprefix(RAGGED))
        return done

    def _take(self, chunk: Chunk, done: Encoded) -> list[Example]:
        examples, counts, refused, sums = done
        self.counts.merge(counts)
        self.sums.update(sums)
        self.encoder.sums = self.sums
        errors: list[tuple[int, UserError]] = [*refused]
        errors += [(n, found) for n, (_, found) in enumerate(chunk) if isinstance(found, UserError)]
        for _, error in sorted(errors, key=lambda pair: pair[0]):
            self.refused.add(error)
        return examples

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()


class _NotSent(Exception):
    """A column that the first rows were not asked for."""


class _View(Mapping):
    """A record by the names of its columns; subclasses say what a value is."""

    def __init__(self, names: Collection[str]):
        self.names = names

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class _Seen(_View):
    """A record that notes which columns are looked at."""

    def __init__(self, record: formats.Record, looked_at: set[str]):
        super().__init__(record)
        self.record, self.looked_at = record, looked_at

    def __getitem__(self, name: str) -> object:
        value = self.record[name]
        self.looked_at.add(name)
        return value


class _Sent(_View):
    """A record with the values of some of its columns. Raises _NotSent for those of others."""

    def __init__(self, record: formats.Record, some: set[str]):
        super().__init__(list(record))
        self.values_of = {name: record[name] for name in self.names if name in some}

    def __getitem__(self, name: str) -> object:
        if name not in self.values_of and name in self.names:
            raise _NotSent(name)
        return self.values_of[name]


def _numbered(chunk: Chunk, looked_at: set[str] | None) -> list[Numbered]:
    """The records, with their places in the chunk. ``looked_at``: takes the columns that are looked at."""
    found = [(n, where, record) for n, (where, record) in enumerate(chunk) if not isinstance(record, UserError)]
    return found if looked_at is None else [(n, where, _Seen(record, looked_at)) for n, where, record in found]


class _Refused:
    """Rows that cannot be used: the first is told, and how many more there are."""

    def __init__(self) -> None:
        self.first: UserError | None = None
        self.count = 0

    def add(self, error: UserError) -> None:
        """Of the next row. Raises UserError when there are so many that reading on tells nothing, and for a file that
        cannot be read on, where no row was refused before.
        """
        if not isinstance(error, RowError):
            self.check()
            raise error
        self.first = self.first or error
        self.count += 1
        if self.count == REFUSED:
            self.check("at least ")

    def check(self, least: str = "") -> None:
        if self.first is not None:
            more = f" ({least}{self.count - 1:,} more rows cannot be used)." if self.count > 1 else "."
            raise UserError(self.first.message.removesuffix(".") + more, self.first.hint) from None


def _read(sources: Sequence[Source], encoder: Encoder, counts: Counts) -> Iterator[Read]:
    """All rows that are to be encoded. In place of one that is refused, and at the end of what cannot be read on, is
    the error, so that errors are told in the order of the rows.
    """
    for source in sources:
        try:
            for where, record in formats.read(source):
                counts.rows += 1
                try:
                    accepted = encoder.accepts(where, record)
                except RowError as e:
                    yield where, e
                    continue
                if accepted:
                    yield where, record
                else:
                    counts.empty += 1
        except UserError as e:
            yield "", e
            return


def _encoded(
    rows: list[Numbered], encoder: Encoder, counts: Counts, refused: list[tuple[int, RowError]]
) -> list[Example]:
    try:
        return encoder.encode([(where, record) for _, where, record in rows], counts) if rows else []
    except RowError as e:
        if len(rows) == 1:
            refused.append((rows[0][0], e))
        else:  # which of them: nothing of this is used any more
            for row in rows:
                _encoded([row], encoder, Counts(), refused)
        return []
