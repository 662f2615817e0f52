"""Sentences with a tag for every word, as rows, to the prepared columns of token classification."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fastft.data.encoder import Counts, Example, Learned, RowError, check_text, write_sizes
from fastft.data.formats import Record
from fastft.data.store import Store
from fastft.errors import UserError, did_you_mean
from fastft.tasks._text import TextEncoder
from fastft.tasks.token_classification import alignment, schemes

if TYPE_CHECKING:
    from fastft.tasks.token_classification import TokenClassification

log = logging.getLogger(__name__)


class TagEncoder(TextEncoder):
    """Word lists to tokens, in windows where they are long; tags to indices.

    ``learned``: of the training set, for an evaluation set.
    """

    columns = {"tokens": "ragged:<i4", "words": "ragged:<i4", "tags": "ragged:<i4", "sentence": "<i8"}
    choices = ("split", "truncate", "drop")
    alone = False  # tags are numbered in the order in which they come up

    def __init__(self, task: TokenClassification, learned: Learned | None):
        self.data = task.data
        super().__init__(task, [self.data.tokens], [self.data.tags])
        self.before, self.after = task.special
        self.room = self.max_length - len(self.before) - len(self.after)
        self.known = learned["labels"] if learned else self.data.labels
        self.origin = "the training data" if learned else "data.labels"
        self.seen: dict[str, tuple[int, str]] = {}  # tag -> its index, and where it was first
        self.starts, self.sentences, self.targets = schemes.Starts(), 0, list[int]()
        if self.room < 1:
            raise UserError(f"data.max_length = {self.max_length} leaves no room beside special tokens.", "Raise it.")

    def accepts(self, where: str, record: Record) -> bool:
        for key in ("tokens", "tags"):
            column = getattr(self.data, key)
            if column not in record:
                hint = f"{did_you_mean(column, record)} Set data.{key} to the column of the {key}."
                raise RowError(f"{where}: no column {column!r}.", hint)
            if not isinstance(record[column], list):
                kind = type(record[column]).__name__
                raise RowError(f"{where}: column {column!r} holds {kind}, not a list.", "Each row is a list of words.")
        words, tags = record[self.data.tokens], record[self.data.tags]
        assert isinstance(words, list) and isinstance(tags, list)
        if len(words) != len(tags):
            raise RowError(
                f"{where}: {len(words)} tokens, but {len(tags)} tags.", "Every token needs one; fix the row."
            )
        for word in words:
            check_text(where, self.data.tokens, word)
        return bool(words)

    def encode(self, rows: list[tuple[str, Record]], counts: Counts) -> list[Example]:
        sentences: list[list[str]] = [r[self.data.tokens] for _, r in rows]  # type: ignore[misc]
        found = alignment.pieces_of(self.tokenizer, sentences)
        return [
            example
            for (where, record), pieces in zip(rows, found, strict=True)
            for example in self._sentence(where, self._names(where, record), pieces, counts)
        ]

    def _sentence(self, where: str, tags: list[str], pieces: alignment.Pieces, counts: Counts) -> list[Example]:
        indices = [self.seen.setdefault(tag, (len(self.seen), where))[0] for tag in tags]
        self.starts.add(tags)
        counts.add("words_without_tokens", len(tags) - len(np.unique(pieces.words)))
        if len(pieces.ids) == 0:
            counts.empty += 1
            return []
        examples = []
        for part in self._parts(where, tags, pieces, counts):
            tokens = [*self.before, *part.ids, *self.after]
            words = [-1] * len(self.before) + [*part.words] + [-1] * len(self.after)
            columns = {"tokens": tokens, "words": words, "tags": indices, "sentence": self.sentences}
            examples.append(Example(where, columns))
            every = self.data.label_pieces == "all"
            self.targets.append(len(part.words) if every else len(np.unique(part.words)))
        self.sentences += 1
        return examples

    def _parts(self, where: str, tags: list[str], pieces: alignment.Pieces, counts: Counts) -> list[alignment.Pieces]:
        """The sentence, or what the truncation policy makes of it."""
        length = len(pieces.ids)
        if length <= self.room:
            return [pieces]
        counts.too_long(where, length + len(self.before) + len(self.after))
        if self.truncation not in ("split", "truncate"):
            counts.dropped += self.truncation == "drop"
            return []
        goes_on = [False, *(schemes.continues(tag, before) for before, tag in pairwise(tags))]
        joined = np.array(goes_on)
        if self.truncation == "split":
            parts = alignment.windows(pieces, self.room, joined)
            counts.split += 1
        else:
            parts = alignment.windows(pieces, self.room, np.zeros(len(tags), bool))
            counts.truncated += 1
            counts.add("words_dropped", len(np.unique(pieces.words)) - len(np.unique(parts[0].words)))
        between = [part.words[0] for part in parts[1:]][: None if self.truncation == "split" else 1]
        counts.add("entities_cut", joined[between].sum() if between else 0)
        parts = parts if self.truncation == "split" else parts[:1]
        kept = np.concatenate([part.words for part in parts])
        counts.add("tokens_dropped", length - len(kept))
        return parts

    def _names(self, where: str, record: Record) -> list[str]:
        """The tags of a row. Raises RowError, naming the row."""
        names, tags = self.data.labels, record[self.data.tags]
        assert isinstance(tags, list)
        return [self._name(where, n, tag, names) for n, tag in enumerate(tags, 1)]

    def _name(self, where: str, number: int, tag: object, names: list[str] | None) -> str:
        here = f"{where}: tag {number}"
        if isinstance(tag, int) and not isinstance(tag, bool):
            if names is None:
                raise RowError(
                    f"{here} is the number {tag}, without a name.",
                    "Name the tags in the order of their numbers: data.labels: [O, B-PER, I-PER, ...].",
                )
            if not 0 <= tag < len(names):
                raise RowError(f"{here} is {tag}, but data.labels names {len(names)} tags.", "Numbers begin with 0.")
            tag = names[tag]
        if not isinstance(tag, str) or not tag.strip():
            raise RowError(f"{here} is no tag: {tag!r}.", "A tag is a name such as B-PER, or O.")
        tag = tag.strip()
        if self.known is not None and tag not in self.known:
            if schemes.OUTSIDE in self.known:
                schemes.check_outside(where, [tag])
            raise RowError(
                f"{here}: {tag!r} does not occur in {self.origin} ({len(self.known)} tags).",
                did_you_mean(tag, self.known),
            )
        return tag

    def finish(self, store: Store, learned: Learned | None) -> dict:
        scheme = learned["scheme"] if learned else self._scheme()
        labels = learned["labels"] if learned else self._labels(scheme)
        totals = write_sizes(store, store.ragged("tokens").lengths(), np.asarray(self.targets, np.int64))
        return {"totals": totals, "labels": labels, "scheme": scheme, "tags": list(self.seen)}

    def _labels(self, scheme: str) -> list[str]:
        """Of the training set: those of data.labels, or all that there are, sorted, "O" first."""
        names = set(self.data.labels or self.seen)
        later = {schemes.later_piece(name, scheme) for name in names} if self.data.label_pieces == "all" else set()
        if self.data.labels is None:
            return sorted(names | later, key=lambda name: (name != schemes.OUTSIDE, name))
        if later - names:
            raise UserError(
                f"data.label_pieces: all needs the tag {min(later - names)!r}, which data.labels does not name.",
                "Add it at the end of data.labels.",
            )
        return self.data.labels

    def _scheme(self) -> str:
        if self.data.scheme == "raw":
            return "raw"
        if self.starts.letters:
            for tag, (_, where) in self.seen.items():
                schemes.check_outside(where, [tag])
        if self.data.scheme == "auto":
            return self.starts.scheme()
        if self.starts.bare:
            raise UserError(
                f"data.scheme: {self.data.scheme}, but the tag {min(self.starts.bare)!r} has no prefix.",
                "Fix the tags, or set data.scheme: raw.",
            )
        return self.data.scheme

    def settle(self, counts: Counts) -> None:
        super().settle(counts)
        if counts.more:
            named = ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in counts.more.items())
            log.warning("%d sentences: %s", counts.rows, named)
