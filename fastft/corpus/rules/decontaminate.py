"""Documents that hold a text of an evaluation set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from fastft import rooms
from fastft.config.base import Section
from fastft.config.corpus import Files, listed
from fastft.corpus.files import DataFile, files_of
from fastft.corpus.ngrams import growing, plain_words, word_places
from fastft.corpus.rules.base import Document, Rule
from fastft.data import formats
from fastft.data.formats.base import MISSING, value_of
from fastft.errors import UserError, did_you_mean

LONGEST = 1 << 24  # bytes of a row of an evaluation set


class EvaluationSet(Files):
    """Texts that a model is evaluated on, and is not to be trained on."""

    texts: Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] | None = (
        Field(None, description="Columns that are looked for, each by itself; default: all text of a row.")
    )


class Cut(Section):
    """What goes is the text that both have, not the document. Lengths are in characters."""

    window: int = Field(
        200, ge=0, description="Characters on either side that go, too, and to a word's end (200 as for GPT-3)."
    )
    shortest: int = Field(200, ge=1, description="Shorter parts that are left go, too; without any the document does.")


Given = str | EvaluationSet | list[str | EvaluationSet]


class DecontaminateSettings(Section):
    """What is looked for, and how much of it a document may hold. Case, punctuation and white space do not count; a
    character of scripts without spaces is a word.
    """

    sets: Annotated[list[EvaluationSet], BeforeValidator(listed, json_schema_input_type=Given)] = Field(
        min_length=1, description="Evaluation sets: a path or URL, a source of files, or a list of them."
    )
    ngram: int = Field(13, ge=1, le=100, description="Words in a row that both have (13 as for GPT-3).")
    shortest: int = Field(
        8,
        ge=1,
        description="Texts with fewer words than ngram are looked for as a whole, if they have so many; shorter ones "
        "are not looked for.",
    )
    share: float = Field(
        0, ge=0, le=1, description="Share of a text's n-grams that the document must hold; 0: one is enough."
    )

    cut: Cut | None = Field(
        None, description="Cut out what both have, and keep the rest of the document; true: by the defaults."
    )

    scalar = "sets"

    @model_validator(mode="after")
    def _shortest_is_an_ngram(self) -> Self:
        if self.shortest > self.ngram:
            raise ValueError(f"shortest: {self.shortest} is above ngram: {self.ngram}")
        return self


@rooms.RULES.register("decontaminate")
class Decontaminate(Rule):
    """Leaves out documents that hold text of evaluation sets, by runs of words, or cuts it out of them."""

    Settings = DecontaminateSettings
    order = 80

    def __init__(self, settings: DecontaminateSettings):
        super().__init__(settings)
        self.share, self.cut = settings.share, settings.cut
        self.names: list[str] = []
        self.where: list[str] = []  # of each text, with its set
        self.set_of: list[int] = []
        self.counts: list[dict[str, int]] = []
        self.last = ""
        self.taken = "", ""  # of the document that was cut last: what was done, and the first text that went
        self.suspects: set[int] = set()  # by their id
        words = [np.zeros(0, np.uint64)]
        sizes = [np.zeros(0, np.int64)]
        for number, source in enumerate(settings.sets):
            self.names.append(source.called)
            own, lengths = self._read(source, number)
            words.append(own)
            sizes.append(lengths)
            short, parts = (int((lengths < limit).sum()) for limit in (settings.shortest, settings.ngram))
            self.counts.append({"texts": len(lengths), "looked_for_whole": parts - short, "too_short": short})
        self._index(np.concatenate(words), np.concatenate(sizes), settings)

    def _read(self, source: EvaluationSet, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Words of a set's texts, and how many each has."""
        texts = list[str]()
        for file in self.files_of(source):
            for where, record in formats.read_file(file, source):
                for text in _texts(where, record, source):
                    texts.append(text)
                    self.where.append(where)
                    self.set_of.append(number)
            if file.too_long:
                raise UserError(f"{file}:{file.too_long[0]}: is longer than {file.most_line:,} bytes.", "Split it.")
        if not texts:
            raise UserError(f"rules.decontaminate: {source.path}: holds no text.", "Give an evaluation set with texts.")
        return plain_words(texts)

    def _index(self, words: np.ndarray, sizes: np.ndarray, settings: DecontaminateSettings) -> None:
        """``runs``: length -> hashes of runs, sorted, and the text of each; ``total``: how many each text has."""
        starts = np.cumsum(sizes) - sizes
        self.longest = settings.ngram
        self.runs: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self.total = np.zeros(len(sizes), np.int64)
        for size, runs in enumerate(growing(words, settings.ngram), start=1):
            if size < settings.shortest:
                continue
            own = np.flatnonzero(sizes == size) if size < settings.ngram else np.flatnonzero(sizes >= size)
            counts = sizes[own] - size + 1
            at = np.repeat(starts[own] - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
            if not len(at):
                continue
            known, texts = runs[at], np.repeat(own, counts)
            order = np.lexsort((texts, known))
            known, texts = known[order], texts[order]
            first = np.concatenate([[True], (known[1:] != known[:-1]) | (texts[1:] != texts[:-1])])
            self.runs[size] = known[first], texts[first]
            self.total += np.bincount(texts[first], minlength=len(sizes))
        most = max((len(runs) for runs, _ in self.runs.values()), default=1)
        bits = max(16, int(16 * most).bit_length())
        self.shift = np.uint64(64 - bits)
        self.maybe = {size: np.zeros(1 << bits, bool) for size in self.runs}  # so that few are searched for
        for size, (runs, _) in self.runs.items():
            self.maybe[size][runs >> self.shift] = True

    def look(self, documents: list[Document]) -> None:
        """Most have nothing in common with any text, which is told for a block at once: runs over two documents among
        them cost some time and nothing else.
        """
        words, counts = plain_words([document.text for document in documents])
        ends, suspects = np.cumsum(counts), set[int]()
        for size, runs in enumerate(growing(words, self.longest), start=1):
            if size in self.runs:
                at = self._held(size, runs)
                suspects.update(np.searchsorted(ends, at, side="right").tolist())
        self.suspects = {id(documents[i]) for i in suspects}

    def apply(self, document: Document) -> str | None:
        """After ``look``."""
        if id(document) not in self.suspects:
            return None
        left, reason, gone = document.text, None, Counter[str]()
        while (found := self._found(left)) is not None:
            said, text, inside = found
            if reason is None:
                reason, self.last = said, self.where[text]
            if self.cut is None:
                return reason
            spans = _spans(left, inside, self.cut.window)
            if not gone:
                self.taken = f"cut out: {reason}", left[slice(*_spans(left, inside, 0)[0])]
            gone[f"cut out: {said}"] += len(spans)
            left = _without(left, spans, self.cut.shortest)  # looked at again: what is now side by side may be a run
        if not gone:
            return None
        if not left:
            return reason
        document.text = left
        self.found.update(gone)
        return None

    def _found(self, text: str) -> tuple[str, int, np.ndarray] | None:
        """What a text holds enough of: the reason, the first evaluation text of it, and whether each word is in what
        both have, (words,) bool. None: not enough of any.
        """
        words, _ = plain_words([text])
        held, places = list[np.ndarray](), list[tuple[int, np.ndarray, np.ndarray]]()
        for size, runs in enumerate(growing(words, min(self.longest, len(words))), start=1):
            if size in self.runs:
                at = self._held(size, runs)
                held += self._texts_with(size, np.unique(runs[at]))
                places.append((size, at, runs[at]))
        if not held:
            return None
        found, counts = np.unique(np.concatenate(held), return_counts=True)
        found = found[counts >= np.maximum(1, self.share * self.total[found])]
        if not len(found):
            return None
        inside = np.zeros(len(words), bool)
        for size, at, runs in places:
            for start, texts in zip(at.tolist(), self._texts_with(size, runs), strict=True):
                inside[start : start + size] |= bool(np.isin(texts, found).any())
        first = int(found[0])
        return f"text of {self.names[self.set_of[first]]}", first, inside

    def _texts_with(self, size: int, runs: np.ndarray) -> list[np.ndarray]:
        """Of each run of words the evaluation texts that have it."""
        known, texts = self.runs[size]
        low, high = np.searchsorted(known, runs), np.searchsorted(known, runs, side="right")
        return [texts[a:b] for a, b in zip(low.tolist(), high.tolist(), strict=True)]

    def _held(self, size: int, runs: np.ndarray) -> np.ndarray:
        """Where runs of words are that a text has."""
        maybe = np.flatnonzero(self.maybe[size][runs >> self.shift])
        known = self.runs[size][0]
        at = np.minimum(np.searchsorted(known, runs[maybe]), len(known) - 1)
        return maybe[known[at] == runs[maybe]]

    def changes(self) -> tuple[str, str]:
        return self.taken

    def details(self) -> dict[str, str]:
        return {"of": self.last}

    def told(self) -> dict[str, Any]:
        """``sets``: of each how many ``texts``, of them ``looked_for_whole`` and ``too_short``."""
        return {"sets": dict(zip(self.names, self.counts, strict=True))}

    @staticmethod
    def files_of(source: EvaluationSet) -> list[DataFile]:
        return files_of(source, LONGEST)

    @classmethod
    def files(cls, settings: DecontaminateSettings) -> list[DataFile]:
        return [file for source in settings.sets for file in cls.files_of(source)]


def _spans(text: str, inside: np.ndarray, window: int) -> list[tuple[int, int]]:
    """Where what goes begins and ends, with the window around it; whole words, ascending and apart from each other."""
    begin, end = word_places(text)
    edges = np.diff(np.concatenate([[False], inside, [False]]).astype(np.int8))
    spans = list[tuple[int, int]]()
    for first, last in zip(np.flatnonzero(edges > 0).tolist(), np.flatnonzero(edges < 0).tolist(), strict=True):
        start, stop = max(0, int(begin[first]) - window), min(len(text), int(end[last - 1]) + window)
        start = min(start, int(begin[np.searchsorted(end, start, side="right")]))
        stop = max(stop, int(end[np.searchsorted(begin, stop) - 1]))
        while start and _sign(text[start - 1]):
            start -= 1
        while stop < len(text) and _sign(text[stop]):
            stop += 1
        if spans and start <= spans[-1][1]:
            start = spans.pop()[0]
        spans.append((start, stop))
    return spans


def _sign(char: str) -> bool:
    """Whether it belongs to what is beside it: neither of a word nor between words."""
    return not char.isalnum() and not char.isspace()


def _without(text: str, spans: list[tuple[int, int]], shortest: int) -> str:
    """What is left, as paragraphs; without parts that are shorter."""
    starts, stops = [0, *(stop for _, stop in spans)], [*(start for start, _ in spans), len(text)]
    parts = (text[start:stop].strip() for start, stop in zip(starts, stops, strict=True))
    return "\n\n".join(part for part in parts if len(part) >= shortest)


def _texts(where: str, record: Any, source: EvaluationSet) -> Iterator[str]:
    """The texts of a row. UserError for a column that is not there."""
    if source.texts is None:
        yield from _all(record)
        return
    for name in source.texts:
        value = value_of(record, name)
        if value is MISSING:
            raise UserError(f"{where}: no column {name!r}.", did_you_mean(name, list(record)))
        yield from _all(value)


def _all(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _all(part)
    elif isinstance(value, list | tuple | np.ndarray):
        for part in value:
            yield from _all(part)
