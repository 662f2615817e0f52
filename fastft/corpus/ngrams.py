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
    found = np.zeros(count, np.uint64)
    for at in range(n):
        found = longer(found, words[at : at + count])
    found ^= found >> np.uint64(31)
    found *= _MIX  # on arrays it wraps without a word
    return found ^ (found >> np.uint64(29))


def longer(hashes: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Hashes of runs of words with one more word at the end of each."""
    return hashes * _MULTIPLIER + words + np.uint64(1)
