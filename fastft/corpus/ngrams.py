"""Hashes of words and of runs of words, as arrays: the same in every process and on every machine."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from functools import cache

import numpy as np

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_PIECE = 1 << 16  # characters that are looked at together: what is made of them stays in a core's cache
_TABLE = 0x20000  # above it are ideographs alone, and signs that no one sees
_ODD = 0xD1342543DE82EF95
# Scripts that have no spaces between words: Thai, Lao, Tibetan, Myanmar, Khmer, Kana, Bopomofo, ideographs.
_UNSPACED = [(0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x3040, 0x312F), (0x31F0, 0x31FF)]
_UNSPACED += [(0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0xFF66, 0xFF9D)]


def longer(hashes: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Hashes of runs of words with one more word at the end of each."""
    return hashes * _MULTIPLIER + words + np.uint64(1)


def growing(words: np.ndarray, n: int) -> Iterator[np.ndarray]:
    """Hashes of all runs of 1, 2, ..., n words."""
    runs = words
    for size in range(1, n + 1):
        if size > 1:
            runs = longer(runs[:-1], words[size - 1 :])
        yield runs


def mixed(hashes: np.ndarray) -> np.ndarray:
    """The same hashes with every bit dependent on all (the end of MurmurHash3)."""
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return hashes ^ (hashes >> np.uint64(33))


def plain_words(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words that texts are compared by: runs of letters and digits in lower case; a character of scripts
    without spaces is a word. Case, punctuation and white space do not count.

    Returns
    -------
    hashes, counts : (words,) uint64 and (texts,) int64
        Of all texts one behind the other, and how many each has.
    """
    found: list[np.ndarray] = []
    counts = np.zeros(len(texts), np.int64)
    group, first, size = list[str](), 0, 0
    for i, text in enumerate(texts):
        if group and size + len(text) > _PIECE:
            found.append(_words_of(group, counts[first:i]))
            group, first, size = [], i, 0
        group.append(text)
        size += len(text) + 1
        if len(text) > _PIECE:
            parts = [_words_of([piece], counts[i:]) for piece in _pieces(text)]
            found += parts
            counts[i] = sum(map(len, parts))
            group, first, size = [], i + 1, 0
    if group:
        found.append(_words_of(group, counts[first:]))
    return np.concatenate([np.zeros(0, np.uint64), *found]), counts


def _pieces(text: str) -> list[str]:
    """A long text, cut at spaces where there are any."""
    pieces, at = list[str](), 0
    while at < len(text):
        end = text.rfind(" ", at, at + _PIECE) + 1 if at + _PIECE < len(text) else len(text)
        end = end if end > at else at + _PIECE
        pieces.append(text[at:end])
        at = end
    return pieces


def word_places(text: str) -> tuple[np.ndarray, np.ndarray]:
    """Where each word of ``plain_words`` begins and ends in a text, in characters, (words,) int64 each."""
    begin, end, at = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for piece in _pieces(text) if len(text) > _PIECE else [text]:
        _, first, last = _borders("\n" + piece + "\n")
        begin.append(first - 1 + at)
        end.append(last + at)
        at += len(piece)
    return np.concatenate(begin), np.concatenate(end)


def _words_of(texts: list[str], counts: np.ndarray) -> np.ndarray:
    """Hashes of their words; writes how many each text has into ``counts``.

    A word's hash is the sum of its characters' values, each times a power of an odd number by its place: differences of
    one running sum, divided by the power of the word's beginning.
    """
    _, _, powers, inverse = _tables()
    signs, first, last = _borders("\n" + "\n".join(texts) + "\n")
    sums = np.cumsum(signs * powers[: len(signs)], dtype=np.uint64)
    borders = np.cumsum([0, *(len(text) + 1 for text in texts)])
    counts[: len(texts)] = np.diff(np.searchsorted(first, borders, side="right"))
    return mixed((sums[last] - sums[first - 1]) * inverse[first])


def _borders(joined: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of texts between line ends each character's value, and where words begin and end (with their last character)."""
    values, alone, _, _ = _tables()
    if joined.isascii():
        codes = np.frombuffer(joined.encode("ascii"), np.uint8)
        signs, single = values[codes], None
    else:
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32)
        low = codes if codes.max() < _TABLE else np.minimum(codes, _TABLE - 1)
        signs, single = values[low], alone[low]
        if low is not codes:
            far = codes >= _TABLE
            signs[far], single[far] = mixed(codes[far].astype(np.uint64)), True
        single = single if single.any() else None
    letters = signs != 0
    starts, ends = letters[1:] > letters[:-1], letters[:-1] > letters[1:]  # at a word's first, behind its last one
    if single is not None:
        cut = letters[1:] & letters[:-1] & (single[1:] | single[:-1])
        starts |= cut
        ends |= cut
    return signs, np.flatnonzero(starts) + 1, np.flatnonzero(ends)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Of every character below ``_TABLE`` its value (0: it separates words), and whether it is a word by itself; powers
    of an odd number, and of its inverse.
    """
    lower = np.zeros(_TABLE, np.uint64)
    for code in range(_TABLE):
        char = chr(code)
        if unicodedata.category(char)[0] in "LMN":
            lower[code] = ord(char.lower()[0])
    alone = np.zeros(_TABLE, bool)
    for start, end in _UNSPACED:
        alone[start : end + 1] = True
    values = np.where(lower > 0, mixed(lower), np.uint64(0))
    return values, alone & (lower > 0), _powers(_ODD), _powers(pow(_ODD, -1, 1 << 64))


def _powers(of: int) -> np.ndarray:
    powers = np.full(2 * _PIECE + 4, of, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, dtype=np.uint64)


def runs_of_words(words: np.ndarray, counts: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """n-grams of texts: of a text with fewer words the one run of all of them.

    Parameters
    ----------
    words, counts : (words,) uint64 and (texts,) int64
        As ``plain_words`` gives them.

    Returns
    -------
    hashes, counts : (runs,) uint64 and (texts,) int64
    """
    ends = np.cumsum(counts)
    starts = ends - counts
    found, chosen = words.copy(), np.zeros(len(words), bool)
    for size, runs in enumerate(growing(words, n), start=1):
        if size < n:
            whole = starts[counts == size]
            found[whole], chosen[whole] = runs[whole], True
    long = counts >= n
    at = np.zeros(len(words) + 1, np.int64)
    at[starts[long]] += 1
    np.subtract.at(at, ends[long] - n + 1, 1)
    begin = np.flatnonzero(np.cumsum(at[:-1]) > 0)
    found[begin], chosen[begin] = runs[begin], True
    return mixed(found[chosen]), np.where(long, counts - n + 1, np.minimum(counts, 1))
