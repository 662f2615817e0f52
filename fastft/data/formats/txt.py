"""Plain text: documents end at a blank line, at every line, or at the file's end (source.documents)."""

from collections.abc import Iterator
from typing import TextIO

from fastft.data.formats.base import open_text, reader, utf8_size


@reader("txt", ".txt", ".text", ".md", ".rst", ".py")
def read(path, source):
    most = getattr(path, "most_text", None)  # bytes of a document; a longer one is split
    with open_text(path) as f:
        for start, text in _documents(f, source.documents, most):
            where = f"{path}" if source.documents == "file" else f"{path}:{start}"
            yield where, {"text": text if source.documents == "file" else text.rstrip("\n")}


def _documents(f: TextIO, ends: str, most: int | None) -> Iterator[tuple[int, str]]:
    """The line, from 1, where each document or part of one begins, and its text."""
    if ends == "file" and most is None:
        yield 1, f.read()
        return
    parts: list[str] = []
    start, held = 1, 0
    for number, line in _lines(f, most):
        blank = not line.strip()
        size = len(line) if most is None else utf8_size(line)
        full = most is not None and held + size > most
        if parts and ((blank and ends == "blank_line") or ends == "line" or full):
            yield start, "".join(parts)
            parts, held = [], 0
        if blank and (ends != "file" or not parts):
            continue
        if not parts:
            start = number
        parts.append(line)
        held += size
    if parts:
        yield start, "".join(parts)


def _lines(f: TextIO, most: int | None) -> Iterator[tuple[int, str]]:
    """Lines with their numbers; one that is longer than ``most`` in parts, all under its number."""
    if most is None:
        yield from enumerate(f, 1)
        return
    number = 1
    while line := f.readline(most):
        for part in _within(line, most):
            yield number, part
        number += line.endswith("\n")


def _within(line: str, most: int) -> Iterator[str]:
    """A line in parts of at most so many bytes, of whole characters."""
    if utf8_size(line) <= most:
        yield line
        return
    content, at = line.encode(errors="surrogatepass"), 0
    while at < len(content):
        end = min(at + most, len(content))
        while end < len(content) and content[end] & 0xC0 == 0x80:  # within a character
            end -= 1
        yield content[at:end].decode(errors="surrogatepass")
        at = end
