"""Documents of a corpus by what they are called: by their id, or by source, file and row."""

from __future__ import annotations

import re

import numpy as np

from fastft.corpus.shards import Corpus
from fastft.data.prepared import split_where
from fastft.errors import UserError, did_you_mean

NAMED = "Name a document by its id (32 hexadecimal digits, of ids.npy), or as source:file:row."


def is_id(said: str) -> bool:
    return re.fullmatch(r"[0-9a-fA-F]{32}", said) is not None


def find(corpus: Corpus, said: str) -> list[tuple[int, int]]:
    """Shard and document of all documents that are called so.

    Parameters
    ----------
    said : str
        An id, or a place as ``Corpus.where`` gives it; without the source, and without the blank behind it, too.

    Returns
    -------
    list of (int, int)
        Ascending. Several where a text is there several times, or a place has several documents.

    Raises
    ------
    UserError
        There is none.
    """
    found = _by_id(corpus, bytes.fromhex(said)) if is_id(said) else _by_place(corpus, said)
    if not found:
        raise UserError(f"{corpus.folder}: holds no document {said!r}.", _hint(corpus, said))
    return found


def rows_of(ids: np.ndarray, wanted: bytes) -> list[int]:
    """Rows of (documents, 16) uint8 ids that are ``wanted``."""
    halves = np.ascontiguousarray(ids).view("<u8")
    first, second = np.frombuffer(wanted, "<u8").tolist()
    return np.flatnonzero((halves[:, 0] == first) & (halves[:, 1] == second)).tolist()


def places(names: list[str], said: str) -> list[tuple[int, int]]:
    """Number of the name, and row, of all that ``said`` may mean: a file that is one document has the row -1."""
    name, row = split_where(said)
    meant = [(said, -1), (name, row), (f"{name}row ", row)]  # rows of Parquet files are called "row 7"
    return [(names.index(name), row) for name, row in meant if name in names]


def _by_id(corpus: Corpus, wanted: bytes) -> list[tuple[int, int]]:
    return [(i, row) for i in range(len(corpus.shards)) for row in rows_of(corpus.ids(i), wanted)]


def _by_place(corpus: Corpus, said: str) -> list[tuple[int, int]]:
    found = []
    for i, shard in enumerate(corpus.shards):
        source = corpus.manifest["sources"][shard.source]
        for place, row in {at for text in _meant(source, said) for at in places(source["places"], text)}:
            column = corpus.places(i)
            found += [(i, at) for at in np.flatnonzero((column[:, 0] == place) & (column[:, 1] == row)).tolist()]
    return sorted(found)


def _meant(source: dict, said: str) -> list[str]:
    """The place without the source's name, and as it is."""
    prefix = f"{source['name']}:"
    return [said, *([said[len(prefix) :].lstrip()] if said.startswith(prefix) else [])]


def _hint(corpus: Corpus, said: str) -> str:
    if is_id(said):
        return "An id is a hash of a text after the rules. " + NAMED
    names = []
    for source in corpus.manifest["sources"]:
        if any(places(source["places"], text) for text in _meant(source, said)):
            return "Its file was read: a rule left the row out, or it is there twice, or it has no such row."
        names += [f"{source['name']}:{name}" for name in source["places"]]
    return f"{did_you_mean(split_where(said)[0], names)} {NAMED}".strip()
