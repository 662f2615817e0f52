"""Near-duplicates: the documents that stay, by their bands, and their sketches, in a file.

What shares a band with a document is compared with it by their n-grams: so a pair is one, whatever the bands are, and
the bands say only how many are found. Of the documents that stay 8 bytes a band are in memory.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from fastft.config.corpus import NearDuplicates
from fastft.corpus.minhash import SKETCH, Sketches, jaccard, shape_of
from fastft.corpus.seen import Sorted
from fastft.errors import UserError

LISTED = 16  # documents with an equal band, the first ones, that a document is compared with
COMPARED = 32  # and with how many in all, those of the most equal bands first
CHUNK = 1 << 16
NUMBER, SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


@dataclass(frozen=True)
class Pair:
    """A document's double that stays: ``row`` of the same block or else ``number`` in the corpus."""

    jaccard: float
    number: int = -1
    row: int = -1


class Near:
    """Sketches of the documents that stay, by their number in the corpus; in ``folder``, which is made.

    ``bands.bin``: (documents, bands) uint32; ``grams.bin``: uint32; ``ends.bin``: (documents,) int64, where each one's
    n-grams end.
    """

    def __init__(self, settings: NearDuplicates, folder: Path):
        self.threshold, self.folder = settings.threshold, folder
        self.shape = shape_of(settings)
        self.index = [Sorted() for _ in range(self.shape[0])]
        self.documents = self.grams = self.pairs = self.compared = 0
        self.files: dict[str, Any] = {}

    def _open(self) -> None:
        self.folder.mkdir(exist_ok=True)
        for name in ("bands", "grams", "ends"):
            self.files[name] = open(self.folder / f"{name}.bin", "a+b", buffering=0)  # noqa: SIM115  # until close

    def state(self) -> dict[str, int]:
        """What is on the disk for good; for ``restore``."""
        for file in self.files.values():
            os.fsync(file.fileno())
        names = ("documents", "grams", "pairs", "compared")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: dict[str, int]) -> None:
        """As it was then; what was written later is cut off. UserError where something is missing."""
        for name, value in state.items():
            setattr(self, name, value)
        self._open()
        sizes = {"bands": 4 * self.documents * self.shape[0], "grams": 4 * self.grams, "ends": 8 * self.documents}
        for name, size in sizes.items():
            if self.files[name].seek(0, os.SEEK_END) < size:
                raise UserError(f"{self.folder / name}.bin: is cut short.", "Prepare anew: fastft prepare --overwrite.")
            self.files[name].truncate(size)
        for first in range(0, self.documents, CHUNK):
            size = min(CHUNK, self.documents - first)
            bands = np.frombuffer(self._read("bands", 4 * self.shape[0] * first, 4 * self.shape[0] * size), np.uint32)
            ends = np.frombuffer(self._read("ends", 8 * max(0, first - 1), 8 * (size + (first > 0))), np.int64)
            counts = np.diff(ends, prepend=0) if first == 0 else np.diff(ends)
            self._add(bands.reshape(size, -1), counts > 0, first)

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files = {}

    def find(self, sketches: Sketches, fresh: np.ndarray) -> list[Pair | None]:
        """For each document of a block its double, which came before and stays; None: it stays itself, or it is none of
        the ``fresh``, (n,) bool. Those that stay are to be added then.
        """
        full = fresh & (sketches.counts > 0)
        before = self._before(sketches.bands, full)
        groups = _groups(sketches.bands, full)
        ends = np.cumsum(sketches.counts).tolist()
        grams = [sketches.grams[end - size : end] for end, size in zip(ends, sketches.counts.tolist(), strict=True)]
        found: list[Pair | None] = [None] * len(fresh)
        for row in sorted({*before, *groups}):
            among = groups.get(row, [])
            rows = Counter(other for kept in among for other in kept[:LISTED])
            pairs = [(-shared, Pair(0, number=number)) for number, shared in before.get(row, [])]
            pairs += [(-shared, Pair(0, row=other)) for other, shared in sorted(rows.items())]
            pairs.sort(key=itemgetter(0))  # those before stay before those of the block
            found[row] = self._first(grams, row, [pair for _, pair in pairs[:COMPARED]])
            if found[row] is None:
                for kept in among:
                    kept.append(row)
        return found

    def _first(self, grams: list[np.ndarray], row: int, pairs: list[Pair]) -> Pair | None:
        mine = grams[row]
        for pair in pairs:
            other = grams[pair.row] if pair.row >= 0 else self._sketch(pair.number)
            small, large = sorted((len(mine), len(other)))
            self.compared += 1
            if large < SKETCH and small < self.threshold * large:
                continue
            if (alike := jaccard(mine, other)) >= self.threshold:
                self.pairs += 1
                return Pair(alike, pair.number, pair.row)
        return None

    def _before(self, bands: np.ndarray, full: np.ndarray) -> dict[int, list[tuple[int, int]]]:
        """Row -> documents that stay with which it has bands in common, and how many: most first, then the earliest."""
        rows, pairs = np.flatnonzero(full), list[np.ndarray]()
        for index, keys in zip(self.index, bands[rows].T.astype(np.uint64) << SHIFT, strict=True):
            order = np.argsort(keys, kind="stable")
            keys, of = keys[order], rows[order]
            parts = [_listed(part, keys, of) for part in index.parts]
            several = np.sort(np.concatenate(parts)) if len(parts) > 1 else np.concatenate([keys[:0], *parts])
            if len(several):
                pairs.append(several[_place(several >> SHIFT) < LISTED])
        if not pairs:
            return {}
        both, shared = np.unique(np.concatenate(pairs), return_counts=True)
        order = np.lexsort((both, -shared, both >> SHIFT))
        order = order[_place(both[order] >> SHIFT) < COMPARED]
        both, shared = both[order], shared[order]
        found: dict[int, list[tuple[int, int]]] = {}
        for row, *pair in zip((both >> SHIFT).tolist(), (both & NUMBER).tolist(), shared.tolist(), strict=True):
            found.setdefault(row, []).append((pair[0], pair[1]))
        return found

    def add(self, sketches: Sketches) -> None:
        """Documents that stay, in their order."""
        if not self.files:
            self._open()
        self.files["bands"].write(np.ascontiguousarray(sketches.bands).data)
        self.files["grams"].write(np.ascontiguousarray(sketches.grams).data)
        self.files["ends"].write((self.grams + np.cumsum(sketches.counts, dtype=np.int64)).data)
        self._add(sketches.bands, sketches.counts > 0, self.documents)
        self.documents += len(sketches.counts)
        self.grams += len(sketches.grams)

    def _add(self, bands: np.ndarray, full: np.ndarray, first: int) -> None:
        numbers = np.flatnonzero(full).astype(np.uint64) + np.uint64(first)
        for index, keys in zip(self.index, bands[full].T.astype(np.uint64), strict=True):
            index.add(np.sort((keys << SHIFT) | numbers))

    def _sketch(self, number: int) -> np.ndarray:
        ends = np.frombuffer(self._read("ends", 8 * max(0, number - 1), 16 if number else 8), np.int64).tolist()
        start, end = ends if number else (0, *ends)
        return np.frombuffer(self._read("grams", 4 * start, 4 * (end - start)), np.uint32)

    def _read(self, name: str, at: int, size: int) -> bytes:
        found = os.pread(self.files[name].fileno(), size, at)
        if len(found) != size:
            raise UserError(f"{self.folder / name}.bin: is cut short.", "Prepare anew: fastft prepare --overwrite.")
        return found


def _listed(part: np.ndarray, keys: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Documents of a part of the index with each key, at most ``LISTED``, as row << 32 | number; sorted by row."""
    low = np.searchsorted(part, keys)
    high = np.searchsorted(part, keys | NUMBER, side="right")
    hit = high > low
    if not hit.any():
        return np.zeros(0, np.uint64)
    low, sizes = low[hit], np.minimum(high - low, LISTED)[hit]
    at = np.repeat(low - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
    return np.sort((np.repeat(rows[hit], sizes).astype(np.uint64) << SHIFT) | (part[at] & NUMBER))


def _place(groups: np.ndarray) -> np.ndarray:
    """Of sorted values, how many of the same are before each."""
    first = np.concatenate([[True], groups[1:] != groups[:-1]])
    starts = np.flatnonzero(first)
    return np.arange(len(groups)) - np.repeat(starts, np.diff(np.append(starts, len(groups))))


def _groups(bands: np.ndarray, full: np.ndarray) -> dict[int, list[list[int]]]:
    """Row -> for each of its bands that another row of the block has, too, a list that they share (of those kept)."""
    found: dict[int, list[list[int]]] = {}
    rows = np.flatnonzero(full)
    for keys in bands[rows].T:
        for group in _equal(keys):
            kept = list[int]()
            for row in rows[group].tolist():
                found.setdefault(row, []).append(kept)
    return found


def _equal(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Where the same keys are, of each that is there several times."""
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], keys[order[1:]] != keys[order[:-1]]]))
    sizes = np.diff(np.append(starts, len(keys)))
    for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        yield order[start : start + size]
