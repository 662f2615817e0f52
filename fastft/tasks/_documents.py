"""What tasks share that learn from documents: cutting them to the length limit, packing the pieces into sequences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fastft.data.encoder import Counts, write_sizes
from fastft.data.pack import best_fit
from fastft.data.prepared import Prepared
from fastft.data.split import Split
from fastft.data.store import Store


def count_long(where: str, length: int, size: int, truncation: str, counts: Counts) -> None:
    """Note a document that is longer than ``size`` tokens, and what becomes of it."""
    if length <= size:
        return
    counts.too_long(where, length)
    counts.truncated += truncation == "truncate"
    counts.split += truncation == "split"
    counts.dropped += truncation == "drop"


def pieces(lengths: np.ndarray, size: int, truncation: str, overlap: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Document, start and length of the parts that documents are used in, each (n,) int64.

    Parameters
    ----------
    lengths : (documents,) int
    size : int
        Longest part.
    overlap : int
        Tokens that neighbors share where a document is split.
    """
    documents = np.arange(len(lengths))
    if truncation == "split":
        step = size - overlap
        parts = np.where(lengths <= size, 1, -(-(lengths - overlap) // step))
        documents = np.repeat(documents, parts)
        starts = (np.arange(len(documents)) - np.repeat(np.cumsum(parts) - parts, parts)) * step
        return _int64(documents, starts, np.minimum(size, lengths[documents] - starts))
    if truncation == "drop":
        documents = documents[lengths <= size]
    return _int64(documents, np.zeros_like(documents), np.minimum(lengths[documents], size))


def write_packs(
    store: Store,
    parts: tuple[np.ndarray, np.ndarray, np.ndarray],
    size: int,
    packed: bool,
    extra: int,
    targets: np.ndarray,
    groups: np.ndarray | None = None,
) -> dict:
    """Columns ``piece_doc``, ``piece_start``, ``piece_length``, ``packs``, and those of ``write_sizes``; the totals.

    Parameters
    ----------
    size : int
        Longest sequence.
    packed : bool
        Whether a sequence may hold several pieces.
    extra : int
        Special tokens that every piece gets beside its own.
    targets : (pieces,) int
        What each contributes to the loss's denominator.
    groups : (n,) int64, optional
        Where each group of pieces begins, the first at 0: no sequence crosses them.
    """
    for name, column in zip(("piece_doc", "piece_start", "piece_length"), parts, strict=True):
        store.write(name, column)
    lengths = parts[2] + extra
    if packed:
        plans = []
        for start, stop in pairwise([*([0] if groups is None else groups.tolist()), len(lengths)]):
            order, offsets = best_fit(lengths[start:stop], size)
            plans.append((start + order, np.diff(offsets)))
        order, counts = (np.concatenate(column) for column in zip(*plans, strict=True))
    else:
        order, counts = np.arange(len(lengths)), np.ones(len(lengths), np.int64)
    packs = store.write_flat("packs", order, counts)
    none = np.zeros(0, np.int64)
    sizes = np.add.reduceat(lengths[packs.values], packs.offsets[:-1]) if len(packs) else none  # no pack is empty
    sums = np.add.reduceat(targets[packs.values], packs.offsets[:-1]) if len(packs) else none
    return write_sizes(store, sizes, sums)


def pack(data: Prepared, sample: int, column: str = "tokens") -> list[np.ndarray]:
    """The pieces of a training sequence, of a column that has a value for each token."""
    doc, start, length = data["piece_doc"], data["piece_start"], data["piece_length"]
    values = data[column]
    return [values[int(doc[p])][int(start[p]) : int(start[p]) + int(length[p])] for p in data["packs"][sample]]


def documents_of(split: Split, sample: int) -> list[str]:
    """Where the documents of a sequence were read, and which tokens of one that is not whole."""
    data, found = split.data, []
    for p in data["packs"][sample]:
        doc, start, length = (int(data[name][p]) for name in ("piece_doc", "piece_start", "piece_length"))
        whole = start == 0 and length == len(data["tokens"][doc])
        found.append(data.origin(doc) + ("" if whole else f" tokens {start} to {start + length - 1}"))
    return found


def _int64(*arrays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, second, third = (a.astype(np.int64) for a in arrays)
    return first, second, third
