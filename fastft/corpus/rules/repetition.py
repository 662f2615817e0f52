"""Documents that repeat themselves."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.ngrams import longer, word_hashes
from fastft.corpus.rules.base import Document, Rule

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

    def apply(self, document: Document) -> str | None:
        limits, lines = self.limits, document.lines
        if len(set(lines)) < len(lines):
            repeated = [(line, count - 1) for line, count in Counter(lines).items() if count > 1]
            if sum(count for _, count in repeated) > limits.duplicate_lines * len(lines):
                return "duplicate lines"
            characters = sum(map(len, lines))
            if sum(len(line) * count for line, count in repeated) > limits.duplicate_line_characters * characters:
                return "characters in duplicate lines"
        return self._ngrams(document.words)

    def _ngrams(self, words: list[str]) -> str | None:
        """Runs of words from the shortest on: a longer one that comes twice begins with a shorter one that does."""
        hashes, sizes = word_hashes(words), np.fromiter(map(len, words), np.int64, len(words))
        ends = np.concatenate([[0], np.cumsum(sizes)])
        at, runs = np.arange(len(words)), hashes  # where runs begin that come several times, and their hashes
        for n in range(2, self.longest + 1):
            at, runs = (found[: np.searchsorted(at, len(words) - n + 1)] for found in (at, runs))
            runs = longer(runs, hashes[at + n - 1])
            order = np.argsort(runs, kind="stable")
            same = runs[order[1:]] == runs[order[:-1]]
            if not same.any():
                return None
            if n in self.top and _in_top(order, same, at, ends, n) > self.top[n] * ends[-1]:
                return f"most frequent {n}-gram"
            if n in self.again:
                covered = np.zeros(len(words) + 1, np.int64)
                starts = at[order[1:][same]]
                covered[starts] += 1  # no run begins twice at one place
                np.subtract.at(covered, starts + n, 1)
                if sizes[np.cumsum(covered[:-1]) > 0].sum() > self.again[n] * ends[-1]:
                    return f"duplicate {n}-grams"
            several = np.zeros(len(at), bool)
            several[order[1:][same]] = several[order[:-1][same]] = True
            at, runs = at[several], runs[several]
        return None


def _in_top(order: np.ndarray, same: np.ndarray, at: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Characters in the most frequent run; of those the first."""
    firsts = np.flatnonzero(np.concatenate([[True], ~same]))
    counts = np.diff(np.append(firsts, len(order)))
    top = int(counts.max())
    first = int(at[order[firsts[counts == top]]].min())
    return top * int(ends[first + n] - ends[first])
