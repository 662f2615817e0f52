"""MinHash signatures of texts (Broder 1997), cut into bands (Leskovec, Rajaraman, Ullman: Mining of Massive Datasets,
3.4), and sketches by which two texts are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

import numpy as np

from fastft.config.corpus import NearDuplicates
from fastft.corpus.ngrams import mixed, plain_words, runs_of_words

VERSION = 1  # raise it when the same texts are told apart otherwise
SKETCH = 1024  # n-grams of a document that are kept: of longer ones those of the smallest hashes
RECALL = 0.99  # of pairs as similar as the threshold that share a band, where bands are not given
MOST_BANDS, MOST_ROWS = 20, 6


@dataclass
class Sketches:
    """Of n documents.

    Attributes
    ----------
    bands : (n, bands) uint32
        Documents with an equal band are compared.
    grams, counts : (grams,) uint32 and (n,) int64
        Different n-grams' hashes of each document, rising, one document behind the other, at most ``SKETCH`` of each;
        and how many. A document without a word has none.
    """

    bands: np.ndarray
    grams: np.ndarray
    counts: np.ndarray

    def only(self, kept: np.ndarray) -> Sketches:
        """Those documents alone. ``kept``: (n,) bool."""
        return Sketches(self.bands[kept], self.grams[np.repeat(kept, self.counts)], self.counts[kept])


def shape_of(settings: NearDuplicates) -> tuple[int, int]:
    """Bands, and rows of each: as given, or the longest bands by which ``RECALL`` of pairs at the threshold meet."""
    bands, rows, threshold = settings.bands, settings.rows, settings.threshold
    if bands is not None and rows is not None:
        return bands, rows

    def needed(length: int) -> int:
        return max(1, ceil(log(1 - RECALL) / log(1 - min(threshold, 0.999) ** length)))

    if rows is not None:
        return needed(rows), rows
    most = bands or MOST_BANDS
    longest = max((n for n in range(1, MOST_ROWS + 1) if needed(n) <= most), default=1)
    return bands or needed(longest), longest


class MinHash:
    """Makes sketches: the same of the same text in every process."""

    def __init__(self, settings: NearDuplicates):
        self.ngram = settings.ngram
        self.shape = shape_of(settings)
        count = self.shape[0] * self.shape[1]
        numbers = np.arange(1, 2 * count + 1, dtype=np.uint64) + np.uint64(settings.seed << 20)
        drawn = mixed(numbers).astype(np.uint32).reshape(2, count)
        self.factors, self.offsets = drawn[0] | np.uint32(1), drawn[1]

    def of(self, texts: list[str]) -> Sketches:
        hashes, counts = runs_of_words(*plain_words(texts), self.ngram)
        rows = np.repeat(np.arange(len(texts), dtype=np.uint64), counts)
        both = np.sort((rows << np.uint64(32)) | (hashes >> np.uint64(32)))
        both = both[np.concatenate([[True], both[1:] != both[:-1]])] if len(both) else both
        grams = both.astype(np.uint32)
        counts = np.bincount((both >> np.uint64(32)).astype(np.int64), minlength=len(texts))
        bands = self._bands(grams, counts)
        return Sketches(bands, *_smallest(grams, counts))

    def _bands(self, grams: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """The smallest hash of every document under each permutation, and those of a band as one."""
        bands, rows = self.shape
        full = counts > 0
        starts = (np.cumsum(counts) - counts)[full]
        found = np.zeros((len(counts), bands), np.uint32)
        if not len(starts):
            return found
        key, permuted = np.zeros(len(starts), np.uint64), np.empty_like(grams)
        for number, (factor, offset) in enumerate(zip(self.factors, self.offsets, strict=True)):
            np.multiply(grams, factor, out=permuted)
            np.add(permuted, offset, out=permuted)
            key = mixed(key + np.minimum.reduceat(permuted, starts) + np.uint64(1))
            if number % rows == rows - 1:
                found[full, number // rows] = key >> np.uint64(32)
                key = np.zeros(len(starts), np.uint64)
        return found


def _smallest(grams: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if counts.max(initial=0) <= SKETCH:
        return grams, counts
    place = np.arange(len(grams)) - np.repeat(np.cumsum(counts) - counts, counts)
    return grams[place < SKETCH], np.minimum(counts, SKETCH)


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Shared of all n-grams of two documents, from their sketches: exact where neither is cut, else estimated from the
    ``SKETCH`` smallest of both (standard deviation at 0.8: 0.0125).
    """
    if not len(one) or not len(other):
        return 0.0
    both = np.sort(np.concatenate([one, other]), kind="stable")
    twice = np.concatenate([[False], both[1:] == both[:-1]])
    if max(len(one), len(other)) >= SKETCH:
        different = np.cumsum(~twice)
        twice = twice[different <= SKETCH]
    shared = int(twice.sum())
    return shared / (len(twice) - shared)
