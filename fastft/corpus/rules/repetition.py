"""Documents that repeat themselves."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Annotated

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.ngrams import longer
from fastft.corpus.rules.base import Document, Rule

_TEXT = np.uint64(0xA24BAED4963EE407)  # odd: runs of two texts are never the same
Run = Annotated[int, Field(ge=2)]


class RepetitionSettings(Section):
    """Largest shares; those of Rae et al. 2021 (Gopher, arXiv 2112.11446, table A1) are the defaults."""

    duplicate_lines: float = Field(0.3, ge=0, le=1, description="Lines that are there before.")
    duplicate_line_characters: float = Field(0.2, ge=0, le=1, description="Characters in such lines.")
    top_ngrams: dict[Run, float] = Field(
        {2: 0.2, 3: 0.18, 4: 0.16}, description="Length in words -> characters in the most frequent run of so many."
    )
    duplicate_ngrams: dict[Run, float] = Field(
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
        self.limits, self.top, self.again = settings, settings.top_ngrams, settings.duplicate_ngrams
        self.longest = max([*self.top, *self.again], default=1)
        self.told_of: dict[int, str | None] = {}

    def look(self, documents: list[Document]) -> None:
        """Runs of words of a whole block at once."""
        told = self._ngrams([document.words for document in documents])
        self.told_of = {id(document): reason for document, reason in zip(documents, told, strict=True)}

    def apply(self, document: Document) -> str | None:
        """After ``look``."""
        limits, lines = self.limits, document.lines
        if len(set(lines)) < len(lines):
            repeated = [(line, count - 1) for line, count in Counter(lines).items() if count > 1]
            if sum(count for _, count in repeated) > limits.duplicate_lines * len(lines):
                return "duplicate lines"
            characters = sum(map(len, lines))
            if sum(len(line) * count for line, count in repeated) > limits.duplicate_line_characters * characters:
                return "characters in duplicate lines"
        return self.told_of[id(document)]

    def _ngrams(self, texts: list[list[str]]) -> list[str | None]:
        """What is said of each text, from the shortest runs on: a longer one that comes twice begins with a shorter one
        that does.
        """
        words = list(chain.from_iterable(texts))
        counts = np.fromiter(map(len, texts), np.int64, len(texts))
        hashes = np.fromiter(map(hash, words), np.int64, len(words)).view(np.uint64)  # those of a text are compared
        sizes = np.fromiter(map(len, words), np.int64, len(words))
        borders, ends = _sums(counts), _sums(sizes)
        text = np.repeat(np.arange(len(texts)), counts)  # of every word
        characters = np.diff(ends[borders])  # of every text
        said = np.full(len(texts), "", object)
        at, runs = np.arange(len(words)), hashes + _TEXT * text.astype(np.uint64)  # runs that come several times
        for n in range(2, self.longest + 1):
            whole = at + n <= borders[text[at] + 1]
            at, runs = at[whole], runs[whole]
            runs = longer(runs, hashes[at + n - 1])
            often = _perhaps_often(runs)
            at, runs = at[often], runs[often]
            order = np.argsort(runs, kind="stable")
            at, runs = at[order], runs[order]
            same = runs[1:] == runs[:-1]
            if not same.any():
                break
            again = np.concatenate([[False], same])
            if n in self.top:
                found, size = _top(at, again, text, ends, n)
                said[_first(said, found[size > self.top[n] * characters[found]])] = f"most frequent {n}-gram"
            if n in self.again:
                covered = np.zeros(len(words) + 1, np.int64)
                covered[at[again]] += 1  # no run begins twice at one place
                np.subtract.at(covered, at[again] + n, 1)
                inside = np.diff(_sums(np.where(np.cumsum(covered[:-1]) > 0, sizes, 0))[borders])
                too_much = np.flatnonzero(inside > self.again[n] * characters)
                said[_first(said, too_much)] = f"duplicate {n}-grams"
            several = again | np.concatenate([same, [False]])
            at, runs = at[several], runs[several]
            order = np.argsort(at)
            at, runs = at[order], runs[order]
        return [reason or None for reason in said]


def _sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(values)])


def _first(said: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Those of which nothing has been said."""
    return texts[said[texts] == ""]


def _perhaps_often(runs: np.ndarray) -> np.ndarray:
    """(n,) bool: all of n hashes that are there several times, and a few of the others: sorting is dear."""
    bits = max(10, len(runs).bit_length() + 1)
    bins = (runs >> np.uint64(64 - bits)).astype(np.int64)
    return np.bincount(bins, minlength=1 << bits)[bins] > 1


def _top(
    at: np.ndarray, again: np.ndarray, text: np.ndarray, ends: np.ndarray, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts in which a run comes several times, and the characters in the most frequent one; of those the first.

    ``at``: where runs begin, equal ones together; ``again``: whether one is the same as the one before.
    """
    begin = np.flatnonzero(~again)
    counts = np.diff(np.append(begin, len(at)))
    first, counts = at[begin[counts > 1]], counts[counts > 1]
    order = np.lexsort((first, -counts, text[first]))
    first, counts = first[order], counts[order]
    found, where = np.unique(text[first], return_index=True)
    first, counts = first[where], counts[where]
    return found, counts * (ends[first + n] - ends[first])
