"""Words of Chinese text, as jieba segments it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fastft.errors import UserError

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]{2,}")


def segmenter(wanted: str) -> Callable[[str], list[str]] | None:
    """jieba's, where it is wanted; None: a character is a word. UserError where it must be and is not installed."""
    if wanted == "none":
        return None
    try:
        import jieba
    except ImportError:
        if wanted == "jieba":
            raise UserError("data.chinese_words: jieba is not installed.", "pip install 'fastft[zh]'") from None
        return None
    jieba.setLogLevel("WARNING")
    return jieba.lcut


def spans(text: str, segment: Callable[[str], list[str]]) -> Iterator[tuple[int, int]]:
    """Start and end of the words in the Chinese parts of a text."""
    for part in HAN.finditer(text):
        at = part.start()
        for word in segment(part[0]):
            yield at, at + len(word)
            at += len(word)
