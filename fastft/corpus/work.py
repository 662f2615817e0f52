"""What is done with a block of rows, in whichever process: rules, then tokens."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fastft.config.corpus import corpus_config
from fastft.corpus.minhash import MinHash, Sketches
from fastft.corpus.rules.base import Document, Rule, chosen
from fastft.corpus.tokens import Encoder, TokenizerFacts
from fastft.errors import UserError

SAMPLES = 3  # documents left out for a reason that the manifest shows
SHOWN = 200  # characters of each
Place = tuple[int, int]  # file of the source, row in it; -1: the file is the document


@dataclass
class Count:
    """What a rule did.

    Attributes
    ----------
    rows, changed, dropped : int
        Documents that came in, whose text was changed, that were left out.
    reasons : dict of str
        Why, and how many.
    samples : list of dict
        ``where``, ``reason`` and the beginning of the ``text`` of the first that were left out for each reason; of a
        near-duplicate also the document ``of`` which it is one, and how alike they are (``jaccard``).
    found : dict of str
        What a rule has found in documents, and how many times.
    """

    rows: int = 0
    changed: int = 0
    dropped: int = 0
    reasons: dict[str, int] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    found: dict[str, int] = field(default_factory=dict)

    def shows(self, reason: str) -> bool:
        """Whether one more that is left out for it would be shown."""
        return self.reasons.get(reason, 0) < SAMPLES

    def drop(self, where: str, reason: str, text: str, **more: str) -> None:
        if self.shows(reason):
            self.samples.append({"where": where, "reason": reason, "text": text[:SHOWN], **more})
        self.dropped += 1
        self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def show(self, where: str, reason: str, text: str, **more: str) -> None:
        """A sample of what was changed in documents that stay."""
        if sum(sample["reason"] == reason for sample in self.samples) < SAMPLES:
            self.samples.append({"where": where, "reason": reason, "text": text[:SHOWN], **more})

    def add(self, other: Count) -> None:
        self.rows += other.rows
        self.changed += other.changed
        self.dropped += other.dropped
        shown = Counter(sample["reason"] for sample in self.samples)
        for sample in other.samples:
            shown[sample["reason"]] += 1
            if shown[sample["reason"]] <= SAMPLES:
                self.samples.append(sample)
        for own, more in ((self.reasons, other.reasons), (self.found, other.found)):
            for name, count in more.items():
                own[name] = own.get(name, 0) + count


@dataclass
class Rows:
    """Rows of a source as they were read: where each is, its text, and what the files in ``places`` are called."""

    places: list[Place] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)

    def where(self, i: int) -> str:
        """In words."""
        return place_name(self.names, *self.places[i])

    def rows(self) -> tuple[Rows, Count, UserError | None]:
        """Themselves, what reading them counted, and what stopped it: of rows that were read already nothing."""
        return self, Count(), None


class Unread(Protocol):
    """What becomes rows where it is worked on: see ``lines.Lines``."""

    def rows(self) -> tuple[Rows, Count, UserError | None]: ...


def place_name(names: Mapping[int, str] | Sequence[str], place: int, row: int) -> str:
    """A place in words."""
    return f"{names[place]}{row}" if row >= 0 else names[place]


@dataclass
class Done:
    """What a block of rows has become.

    Attributes
    ----------
    places : (n, 2) int64
        File and row of the documents that stay.
    names : dict of str
        What the files are called.
    ids : list of bytes
        A hash of each text, 16 bytes.
    tokens, lengths : (tokens,) and (n,)
    characters : (n,) int64
    counts : dict of str
        By rule.
    sketches : Sketches or None
        Where near-duplicates are looked for.
    read : Count
        Rows, and those that have no text.
    broken : UserError or None
        Why the file's rows end here, before its end.
    """

    places: np.ndarray
    names: dict[int, str]
    ids: list[bytes]
    tokens: np.ndarray
    lengths: np.ndarray
    characters: np.ndarray
    counts: dict[str, Count]
    sketches: Sketches | None = None
    read: Count = field(default_factory=Count)
    broken: UserError | None = None

    def where(self, i: int) -> str:
        """Of a document, in words."""
        return place_name(self.names, *self.places[i].tolist())

    def only(self, kept: np.ndarray) -> Done:
        """Those documents alone. ``kept``: (n,) bool."""
        at = np.flatnonzero(kept).tolist()
        tokens = self.tokens[np.repeat(kept, self.lengths)]
        return replace(
            self,
            places=self.places[kept],
            ids=[self.ids[i] for i in at],
            tokens=tokens,
            lengths=self.lengths[kept],
            characters=self.characters[kept],
            sketches=self.sketches.only(kept) if self.sketches is not None else None,
        )


class Worker:
    """Cleans and tokenizes blocks: the same block becomes the same in every process."""

    def __init__(self, config: dict[str, Any], facts: TokenizerFacts, fast: bool):
        """``config``: as it is dumped, for the classes of sections do not pickle."""
        settings = corpus_config(config, "prepare")
        self.rules = [(name, kind(own)) for name, kind, own in chosen(settings)]
        self.passes: list[list[tuple[str, Rule]]] = []
        for name, rule in self.rules:
            if not self.passes or type(rule).look is not Rule.look:
                self.passes.append([])
            self.passes[-1].append((name, rule))
        near = settings.duplicates.near
        self.minhash = MinHash(near) if near is not None else None
        self.encoder = Encoder(facts, fast)
        self.dtype = facts.dtype

    def run(self, unread: Unread) -> Done:
        rows, read, broken = unread.rows()
        counts = {name: Count() for name, _ in self.rules}
        left = [(i, Document(text)) for i, text in enumerate(rows.texts)] if self.passes else []
        for rules in self.passes:
            rules[0][1].look([document for _, document in left])
            left = [(i, document) for i, document in left if self._stays(rules, document, rows, i, counts)]
        for name, rule in self.rules:
            counts[name].found = dict(rule.found)
            rule.found.clear()
        kept, texts = list(range(len(rows.texts))), rows.texts
        if self.passes:
            kept, texts = [i for i, _ in left], [document.text for _, document in left]
        tokens, lengths = self.encoder.encode(texts)
        counts["tokens"] = empty = Count(rows=len(texts))
        if self.encoder.written:
            empty.found, self.encoder.written = {"special tokens in the text": self.encoder.written}, 0
        for at in np.flatnonzero(lengths == 0).tolist():
            empty.drop(rows.where(kept[at]), "no token", texts[at])
        full = np.flatnonzero(lengths).tolist()
        return Done(
            np.array([rows.places[kept[at]] for at in full], np.int64).reshape(-1, 2),
            rows.names,
            [identity(texts[at]) for at in full],
            tokens.astype(self.dtype),
            lengths[full],
            np.array([len(texts[at]) for at in full], np.int64),
            counts,
            self.minhash.of([texts[at] for at in full]) if self.minhash is not None else None,
            read,
            broken,
        )

    @staticmethod
    def _stays(rules: list[tuple[str, Rule]], document: Document, rows: Rows, i: int, counts: dict[str, Count]) -> bool:
        for name, rule in rules:
            count, before = counts[name], document.text
            count.rows += 1
            reason = rule.apply(document)
            if reason is not None:
                count.drop(rows.where(i), reason, before, **rule.details())
                return False
            if document.text is not before:
                count.changed += 1
                if (said := rule.changes()) is not None:
                    count.show(rows.where(i), *said, **rule.details())
        document.forget()
        return True


def libraries(fast: bool) -> dict[str, str]:
    """Versions of what makes the tokens."""
    from importlib.metadata import version

    return {name: version(name) for name in ("numpy", "tokenizers", *(["gigatoken"] if fast else []))}


def software(config: dict[str, Any], facts: TokenizerFacts, fast: bool) -> dict[str, str]:
    """Versions that must be the same wherever a part of a corpus is made. The arguments are a worker's."""
    from fastft import __version__

    found = {"fastft": __version__, "Unicode": unicodedata.unidata_version, **libraries(fast)}
    for _, kind, _ in chosen(corpus_config(config, "prepare")):
        found |= kind.versions()
    return found


def identity(text: str) -> bytes:
    """What a document is known by: a hash of its text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
