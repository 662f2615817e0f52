"""What all readers share: the table, opening text (gzip or not), formats by file name."""

import gzip
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

from fastft.config import Source
from fastft.registry import Registry

Record = dict[str, object]
Reader = Callable[[Path, Source], Iterator[tuple[str, Record]]]
FORMATS: Registry[Reader] = Registry("data format")
SUFFIXES: dict[str, str] = {}  # ".jsonl" -> "jsonl"


def reader(name: str, *suffixes: str):
    """Register a reader under its name and the file suffixes it takes."""
    for suffix in suffixes:
        SUFFIXES[suffix] = name
    return FORMATS.register(name)


def format_of(path: Path) -> str | None:
    """Format by suffix, seen through .gz; None when unknown."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return SUFFIXES.get(suffixes[-1]) if suffixes else None


def open_text(path: Path, newline: str | None = None) -> TextIO:
    """UTF-8 text (a byte-order mark is dropped), decompressed when the file is gzip, whatever its name."""
    with open(path, "rb") as f:
        zipped = f.read(2) == b"\x1f\x8b"
    return (gzip.open if zipped else open)(path, "rt", encoding="utf-8-sig", newline=newline)
