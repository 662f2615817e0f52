"""Hashes of words and of runs of words, as arrays: the same in every process and on every machine."""

from __future__ import annotations

from zlib import crc32

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def word_hashes(words: list[str]) -> np.ndarray:
    """(n,) uint64 of n words."""
    joined = "\0".join(words).encode(errors="surrogatepass").split(b"\0") if words else []
    return np.fromiter(map(crc32, joined), np.uint64, len(joined))


def longer(hashes: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Hashes of runs of words with one more word at the end of each."""
    return hashes * _MULTIPLIER + words + np.uint64(1)
