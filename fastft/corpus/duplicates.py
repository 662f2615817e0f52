"""Which documents are there before: the same text, by its hash; nearly the same, by n-grams."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fastft.config.corpus import Duplicates
from fastft.corpus.near import Near
from fastft.corpus.seen import Seen
from fastft.corpus.work import Count, Done

SAME, ALIKE = "the same text", "nearly the same text"


class Filter:
    """Leaves out what is there before, in the order of the documents."""

    def __init__(self, settings: Duplicates, folder: Path):
        """``folder``: for what is kept on the disk of near-duplicates while the corpus is made."""
        self.on = settings.exact
        self.seen = Seen()
        self.near = Near(settings.near, folder) if settings.near is not None else None

    def without(self, done: Done, count: Count, where: Callable[[int], str]) -> Done:
        """What of a block is new; the rest is counted. ``where``: in words, of a number of a document that stays."""
        count.rows += len(done.ids)
        if not done.ids:
            return done
        kept = self.seen.new(done.ids)
        for i in np.flatnonzero(~kept).tolist():
            count.drop(done.where(i), SAME, done.ids[i].hex())
        if self.near is not None and done.sketches is not None:
            for i, pair in enumerate(self.near.find(done.sketches, kept)):
                if pair is not None:
                    kept[i] = False
                    of = "" if not count.shows(ALIKE) else done.where(pair.row) if pair.row >= 0 else where(pair.number)
                    count.drop(done.where(i), ALIKE, done.ids[i].hex(), of=of, jaccard=f"{pair.jaccard:.3f}")
        done = done if kept.all() else done.only(kept)
        self.seen.add(np.frombuffer(b"".join(done.ids), np.uint8).reshape(-1, 16))
        if self.near is not None and done.sketches is not None:
            self.near.add(done.sketches)
        return done

    def state(self) -> dict[str, int]:
        """What of it is safe on the disk."""
        return self.near.state() if self.near is not None else {}

    def restore(self, state: dict[str, int], ids: Iterable[np.ndarray]) -> None:
        """``ids``: of each complete shard."""
        for part in ids if self.on else ():
            self.seen.add(part)
        if self.near is not None:
            self.near.restore(state)

    def told(self) -> dict[str, Any]:
        """For the manifest."""
        if self.near is None:
            return {}
        bands, rows = self.near.shape
        return {"pairs": self.near.pairs, "compared": self.near.compared, "bands": bands, "rows": rows}

    def close(self) -> None:
        if self.near is not None:
            self.near.close()
