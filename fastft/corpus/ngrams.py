"""Hashes of words and of runs of words, as arrays: the same in every process and on every machine."""

from __future__ import annotations

from zlib import crc32

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)


def word_hashes(words: list[str]) -> np.ndarray:
    """(n,) uint64 of n words."""
    joined = "\0".join(words).encode(errors="surrogatepass").split(b"\0") if words else []
    return np.fromiter(map(crc32, joined), np.uint64, len(joined))


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """(max(0, words - n + 1),) uint64: a hash of every run of ``n`` words, from ``word_hashes``."""
    count = max(0, len(words) - n + 1)
    with np.errstate(over="ignore"):
        found = np.zeros(count, np.uint64)
        for at in range(n):
            found = found * _MULTIPLIER + words[at : at + count] + np.uint64(1)
        found ^= found >> np.uint64(31)
        found *= _MIX
        return found ^ (found >> np.uint64(29))
