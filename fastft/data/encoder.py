"""Rows to examples: what a task says of its data, in a form that can be handed to another process."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from fastft.data.formats import Record
from fastft.data.formats.base import Unreadable
from fastft.data.store import Store
from fastft.errors import UserError

FIRST = 3  # overlong rows that are named
Learned = dict[str, Any]  # what a task learned from its training data (the names of its labels), as JSON


@dataclass
class Counts:
    """What became of the input; nothing is dropped or cut without being counted here."""

    rows: int = 0
    empty: int = 0
    truncated: int = 0
    dropped: int = 0
    split: int = 0
    overlong: list[str] = field(default_factory=list)  # where the first few are
    overlong_total: int = 0
    longest: int = 0
    more: dict[str, int] = field(default_factory=dict)  # what a task counts besides, by name

    def too_long(self, where: str, length: int) -> None:
        self.overlong_total += 1
        self.longest = max(self.longest, length)
        if len(self.overlong) < FIRST:
            self.overlong.append(f"{where} ({length} tokens)")

    def add(self, name: str, number: int = 1) -> None:
        """Count what only this task has (words dropped)."""
        if number:
            self.more[name] = self.more.get(name, 0) + int(number)

    def merge(self, other: Counts) -> None:
        """What became of the rows behind."""
        for name in ("rows", "empty", "truncated", "dropped", "split", "overlong_total"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.overlong = (self.overlong + other.overlong)[:FIRST]
        self.longest = max(self.longest, other.longest)
        for name, number in other.more.items():
            self.add(name, number)

    def as_dict(self) -> dict:
        counts = asdict(self)
        return counts | counts.pop("more")


class Again(Exception):
    """What was encoded may be wrong: all rows are encoded once more, after ``Encoder.again``."""


class RowError(UserError):
    """One row cannot be used. The rows behind it are read all the same, so that the message counts those like it."""


@dataclass
class Example:
    """What one row, or a part of one, becomes.

    Attributes
    ----------
    where : str
        File and line of the row.
    columns : dict
        A value for each of the encoder's columns: a number, or a sequence where the column is ragged.
    extra : object
        What ``finish`` needs beside the columns (label names); kept in memory.
    """

    where: str
    columns: dict[str, Any]
    extra: Any = None


class Encoder(ABC):
    """Encodes the rows of a split. What crosses rows belongs in ``finish``.

    Class attributes
    ----------------
    columns : dict of str
        Column name -> ``"ragged:<dtype>"`` (a sequence per example) or a NumPy dtype (a number per example).
    alone : bool
        Whether ``encode`` may be called for any rows in any process: it then changes nothing of the encoder's own but
        ``sums``.

    Attributes
    ----------
    sums : Counter
        What ``encode`` adds up over all rows, for ``finish``.
    """

    columns: dict[str, str]
    alone: ClassVar[bool] = True

    def __init__(self) -> None:
        self.sums = Counter[str]()

    @abstractmethod
    def accepts(self, where: str, record: Record) -> bool:
        """Whether the row is used; False: it is empty. Raises RowError, naming the row, when it cannot be read."""

    @abstractmethod
    def encode(self, rows: list[tuple[str, Record]], counts: Counts) -> list[Example]:
        """Examples of some rows, in order. Raises RowError, naming the row."""

    @abstractmethod
    def finish(self, store: Store, learned: Learned | None) -> dict:
        """Write what all rows decide together; returns the meta, with ``totals`` (``write_sizes``) and what was
        learned.

        ``learned``: of the training set, for an evaluation set.
        """

    def again(self) -> None:
        """Called after ``encode`` has raised ``Again``, before the first row comes anew."""

    def settle(self, counts: Counts) -> None:
        """Called when everything is read. Raises UserError for what has to be counted first."""


def write_sizes(store: Store, lengths: np.ndarray, targets: np.ndarray) -> dict:
    """Columns ``lengths`` and ``targets`` (see Split), and their totals: a resume reads neither, and there may be
    10^9. ``lengths`` of several parts, (n, parts), are the column ``sizes``, too.
    """
    if lengths.ndim == 2:
        store.write("sizes", lengths.astype(np.int64))
        lengths = lengths.sum(1)
    store.write("lengths", lengths.astype(np.int64))
    store.write("targets", targets.astype(np.float64))
    longest = int(lengths.max(initial=0))
    return {"tokens": int(lengths.sum()), "targets": targets.sum().item(), "longest": longest}


def check_text(where: str, column: str, value: object) -> None:
    """RowError unless the value is text that can be written as UTF-8."""
    if isinstance(value, Unreadable):
        raise RowError(f"{where}: column {column!r} cannot be read: {value.reason}.", "Fix or remove the row.")
    if not isinstance(value, str):
        kind = type(value).__name__
        raise RowError(f"{where}: column {column!r} holds {kind}, not text: {value!r}.", "Fix or remove the row.")
    try:
        value.encode()
    except UnicodeEncodeError as e:
        half = f"({e.object[e.start]!r} at position {e.start})"
        raise RowError(f"{where}: column {column!r} holds half a character {half}.", "Fix the row.") from None
