"""What a corpus holds, for `fastft inspect`: its shards, its documents, how long they are."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastft.corpus.lookup import find
from fastft.corpus.shards import Corpus
from fastft.corpus.tokens import tokenizer_key
from fastft.errors import UserError

FIRST = 5  # documents of a shard that are shown
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def tokenizer_of(corpus: Corpus, path: str | None = None) -> Any:
    """The tokenizer that the corpus was made with. UserError where it cannot be had, or is another one.

    Parameters
    ----------
    path : str, optional
        Where it is now; default: where it was then.
    """
    from fastft.config import Model
    from fastft.models import load

    said = corpus.manifest["tokens"]
    revision = None if path else corpus.manifest["settings"].get("revision")
    try:
        found = load.tokenizer(Model(path=path or said["path"], revision=revision))
    except UserError as e:
        raise UserError(f"{corpus.folder}: its tokenizer: {e.message}", "Say where it is: --tokenizer PATH.") from None
    if tokenizer_key(found) != said["tokenizer"]:
        raise UserError(
            f"{path or said['path']}: is not the tokenizer that {corpus.folder} was made with.",
            "Say where that one is: --tokenizer PATH.",
        )
    return found


def document(corpus: Corpus, tokenizer: Any, shard: int, row: int) -> dict[str, Any]:
    """``id``, ``where``, ``shard``, ``document`` (its row in the shard), ``tokens`` (ids), ``pieces`` (the tokenizer's
    name of each) and ``text`` (decoded).
    """
    ids = corpus.tokens(shard)[row].astype(np.int64).tolist()
    return {
        "id": corpus.ids(shard)[row].tobytes().hex(),
        "where": corpus.where(shard, row),
        "shard": shard,
        "document": row,
        "tokens": ids,
        "pieces": tokenizer.convert_ids_to_tokens(ids),
        "text": tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False),
    }


def documents(corpus: Corpus, tokenizer: Any, said: str) -> list[dict[str, Any]]:
    """All documents that are called so, see ``lookup.find``. UserError when there is none."""
    return [document(corpus, tokenizer, shard, row) for shard, row in find(corpus, said)]


def shard(corpus: Corpus, tokenizer: Any, number: int) -> dict[str, Any]:
    """What the manifest says of a shard, the lengths of its documents, and its ``first`` ones. UserError for a number
    that it does not have.
    """
    if not 0 <= number < len(corpus.shards):
        raise UserError(
            f"--shard {number}: {corpus.folder} has {len(corpus.shards):,} shards.",
            f"Give a number from 0 to {len(corpus.shards) - 1}.",
        )
    said = corpus.shards[number]
    source = corpus.manifest["sources"][said.source]
    return {
        "shard": number,
        "folder": str(corpus.path(number)),
        "source": source["name"],
        "licence": source["licence"],
        "documents": said.documents,
        "tokens": said.tokens,
        "characters": said.characters,
        "files": {name: entry["bytes"] for name, entry in said.files.items()},
        "lengths": lengths(corpus, [number]),
        "first": [document(corpus, tokenizer, number, row) for row in range(min(FIRST, said.documents))],
    }


def lengths(corpus: Corpus, shards: list[int] | None = None) -> dict[str, Any]:
    """How long documents are, in tokens, with those around each.

    Returns
    -------
    dict
        ``documents``, ``tokens``, ``shortest``, ``longest``, ``mean``, ``quantiles`` (share -> length) and
        ``histogram``: ``from`` and ``to`` (with it), ``documents`` and ``tokens`` of each; a bin begins at twice the
        length of the one before.
    """
    found = []
    for number in range(len(corpus.shards)) if shards is None else shards:
        offsets = np.asarray(corpus.tokens(number).offsets)
        found.append(np.diff(offsets).astype(np.uint32 if offsets[-1] < 1 << 32 else np.int64))
    values = np.concatenate(found)
    values.sort()
    edges = 1 << np.arange(int(values[-1]).bit_length() + 1)
    at = np.searchsorted(values, edges)
    bins = []
    for low, high, first, last in zip(edges, edges[1:], at, at[1:], strict=False):
        total = int(values[first:last].sum(dtype=np.int64))
        bins.append({"from": int(low), "to": int(high) - 1, "documents": int(last - first), "tokens": total})
    while not bins[0]["documents"]:
        bins.pop(0)
    tokens = int(values.sum(dtype=np.int64))
    return {
        "documents": len(values),
        "tokens": tokens,
        "shortest": int(values[0]),
        "longest": int(values[-1]),
        "mean": tokens / len(values),
        "quantiles": {str(q): int(values[min(int(q * len(values)), len(values) - 1)]) for q in QUANTILES},
        "histogram": bins,
    }
