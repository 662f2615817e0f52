"""Documents that repeat themselves."""

from __future__ import annotations

from collections import Counter

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.ngrams import ngram_hashes, word_hashes
from fastft.corpus.rules.base import Document, Rule


class RepetitionSettings(Section):
    """Largest shares; those of Rae et al. 2021 (Gopher, arXiv 2112.11446, table A1) are the defaults."""

    duplicate_lines: float = Field(0.3, ge=0, le=1, description="Lines that are there before.")
    duplicate_line_characters: float = Field(0.2, ge=0, le=1, description="Characters in such lines.")
    top_ngrams: dict[int, float] = Field(
        {2: 0.2, 3: 0.18, 4: 0.16}, description="Length in words -> characters in the most frequent run of so many."
    )
    duplicate_ngrams: dict[int, float] = Field(
        {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1},
        description="Length in words -> characters in runs that are there before.",
    )


@rooms.RULES.register("repetition")
class Repetition(Rule):
    """Leaves out documents in which lines or runs of words are repeated too often."""

    Settings = RepetitionSettings
    order = 50

    def __init__(self, settings: RepetitionSettings):
        super().__init__(settings)
        self.limits = settings

    def apply(self, document: Document) -> str | None:
        limits, lines = self.limits, document.lines
        if len(set(lines)) < len(lines):
            repeated = [(line, count - 1) for line, count in Counter(lines).items() if count > 1]
            if sum(count for _, count in repeated) > limits.duplicate_lines * len(lines):
                return "duplicate lines"
            characters = sum(map(len, lines))
            if sum(len(line) * count for line, count in repeated) > limits.duplicate_line_characters * characters:
                return "characters in duplicate lines"
        words = document.words
        if not words:
            return None
        hashes = word_hashes(words)
        sizes = np.fromiter(map(len, words), np.int64, len(words))
        whole = int(sizes.sum())
        for n, most in sorted(limits.top_ngrams.items()):
            if _in_top(hashes, sizes, n) > most * whole:
                return f"most frequent {n}-gram"
        for n, most in sorted(limits.duplicate_ngrams.items()):
            if _in_duplicates(hashes, sizes, n) > most * whole:
                return f"duplicate {n}-grams"
        return None


def _in_top(hashes: np.ndarray, sizes: np.ndarray, n: int) -> int:
    """Characters in the most frequent n-gram, of those the first; 0 where none comes twice."""
    grams = ngram_hashes(hashes, n)
    if len(grams) < 2:
        return 0
    _, first, counts = np.unique(grams, return_index=True, return_counts=True)
    top = int(counts.max())
    if top < 2:
        return 0
    at = int(first[counts == top].min())
    return top * int(sizes[at : at + n].sum())


def _in_duplicates(hashes: np.ndarray, sizes: np.ndarray, n: int) -> int:
    """Characters of words in n-grams that are there before; a word counts once."""
    grams = ngram_hashes(hashes, n)
    if len(grams) < 2:
        return 0
    order = np.argsort(grams, kind="stable")
    again = np.flatnonzero(grams[order][1:] == grams[order][:-1])
    if not len(again):
        return 0
    covered = np.zeros(len(sizes) + 1, np.int64)
    starts = order[1:][again]
    np.add.at(covered, starts, 1)
    np.add.at(covered, starts + n, -1)
    return int(sizes[np.cumsum(covered[:-1]) > 0].sum())
