"""The rows of a split through its encoder, in one process or several: the columns are the same."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
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
Chunk = list[tuple[str, formats.Record]]
Encoded = tuple[list[Example], Counts, list[RowError], Counter[str]]


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
            for example in encoding.examples(_accepted(part, encoder, counts, refused)):
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
    what the first one has loaded.
    """

    def __init__(self, encoder: Encoder, counts: Counts, refused: _Refused, workers: int | None):
        self.encoder, self.counts, self.refused = encoder, counts, refused
        self.workers = workers or len(os.sched_getaffinity(0))
        self.sums = Counter[str]()
        self.begun = False
        self.pool: Copies | None = None
        self.rows = ROWS  # of a chunk

    def examples(self, rows: Iterator[tuple[str, formats.Record]]) -> Iterator[Example]:
        chunks = iter(lambda: list(islice(rows, self.rows)), [])
        if not self.begun or self.workers == 1 or not self.encoder.alone:
            for chunk in chunks:
                self.begun = True
                yield from self._take(self._work(chunk))
                if self.workers > 1 and self.encoder.alone:
                    break
        for chunk in chunks:  # there are more
            self.pool = self.pool or Copies(self._portable, self.workers, "Where memory is short, set data.workers: 1.")
            for _, done in in_order(chain([chunk], chunks), self.pool, self._sent):
                yield from self._take(done)

    def _sent(self, rows: Chunk) -> Chunk:
        """Rows as they are sent: plain ones, for a row of an Arrow batch has all of the batch with it."""
        plain = [(where, dict(record)) for where, record in rows]
        self.rows = max(1, min(ROWS, len(rows) * SENT // len(pickle.dumps(plain, protocol=5))))
        return plain

    def _work(self, rows: Chunk) -> Encoded:
        counts, refused = Counts(), list[RowError]()
        self.encoder.sums = Counter()
        return _encoded(rows, self.encoder, counts, refused), counts, refused, self.encoder.sums

    def _portable(self, rows: Chunk) -> Encoded:
        """In a copy: sequences as arrays, which pickle well."""
        done = self._work(rows)
        for name, kind in self.encoder.columns.items():
            if kind.startswith(RAGGED):
                for example in done[0]:
                    example.columns[name] = np.asarray(example.columns[name], kind.removeprefix(RAGGED))
        return done

    def _take(self, done: Encoded) -> list[Example]:
        examples, counts, refused, sums = done
        self.counts.merge(counts)
        self.sums.update(sums)
        self.encoder.sums = self.sums
        for error in refused:
            self.refused.add(error)
        return examples

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()


class _Refused:
    """Rows that cannot be used: the first is told, and how many more there are."""

    def __init__(self) -> None:
        self.first: RowError | None = None
        self.count = 0

    def add(self, error: RowError) -> None:
        """Raises UserError when there are so many that reading on tells nothing."""
        self.first = self.first or error
        self.count += 1
        if self.count == REFUSED:
            self.check("at least ")

    def check(self, least: str = "") -> None:
        if self.first is not None:
            more = f" ({least}{self.count - 1:,} more rows cannot be used)." if self.count > 1 else "."
            raise UserError(self.first.message.removesuffix(".") + more, self.first.hint) from None


def _accepted(
    sources: Sequence[Source], encoder: Encoder, counts: Counts, refused: _Refused
) -> Iterator[tuple[str, formats.Record]]:
    for where, record in _read(sources, refused):
        counts.rows += 1
        try:
            accepted = encoder.accepts(where, record)
        except RowError as e:
            refused.add(e)
            continue
        if accepted:
            yield where, record
        else:
            counts.empty += 1


def _read(sources: Sequence[Source], refused: _Refused) -> Iterator[tuple[str, formats.Record]]:
    """All rows. Where a file cannot be read on, the rows refused before are told first."""
    for source in sources:
        try:
            yield from formats.read(source)
        except UserError:
            refused.check()
            raise


def _encoded(rows: Chunk, encoder: Encoder, counts: Counts, refused: list[RowError]) -> list[Example]:
    try:
        return encoder.encode(rows, counts)
    except RowError as e:
        if len(rows) == 1:
            refused.append(e)
        else:  # which of them: nothing of this is used any more
            for row in rows:
                _encoded([row], encoder, Counts(), refused)
        return []
