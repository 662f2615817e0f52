"""What a rule is."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fastft import rooms
from fastft.config.base import Section
from fastft.config.corpus import CorpusConfig

if TYPE_CHECKING:
    from fastft.corpus.files import DataFile

# Scripts without spaces between words (Han, Kana): of them a character is taken for a word.
UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")


class Document:
    """A text and what is known of it; a rule that changes the text has the rest found again."""

    def __init__(self, text: str):
        self._text = text

    @property
    def text(self) -> str:
        return self._text

    @text.setter
    def text(self, text: str) -> None:
        self._text = text
        self.forget()

    def forget(self) -> None:
        """Leave the text alone in memory."""
        for name in ("words", "lines"):
            self.__dict__.pop(name, None)

    @cached_property
    def words(self) -> list[str]:
        """What white space separates; characters of scripts that have none between words."""
        text = self._text
        if not text.isascii() and (np.frombuffer(text.encode("utf-16-le", "surrogatepass"), "<u2") > 0x303F).any():
            text = UNSPACED.sub(r" \g<0> ", text)
        return text.split()

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not blank, without the white space around them."""
        return [line for part in self._text.split("\n") if (line := part.strip())]


def rising(settings: Section, *pairs: tuple[str, str]) -> None:
    """ValueError where a least value is above the largest."""
    for least, most in pairs:
        low, high = getattr(settings, least), getattr(settings, most)
        if low is not None and high is not None and low > high:
            raise ValueError(f"{least}: {low:,} is above {most}: {high:,}: nothing would be left")


class Rule(ABC):
    """Changes a document's text, or says why it is left out. One instance per process; documents in any order.

    Class attributes
    ----------------
    Settings : Section type
        Its keys below ``rules.<name>``.
    order : int
        Rules run by it: repairs first, judgements after them.
    version : int
        Raise it when the same text comes out differently.
    """

    Settings: ClassVar[type[Section]] = Section
    order: ClassVar[int]
    version: ClassVar[int] = 1

    def __init__(self, settings: Section):
        self.settings = settings
        self.found = Counter[str]()  # what is counted besides, by name

    def look(self, documents: list[Document]) -> None:
        """Called before ``apply`` with all documents of a block that come to the rule, for what is quicker together."""

    @abstractmethod
    def apply(self, document: Document) -> str | None:
        """Why the document is left out, in a few words without numbers of its own; None: it stays."""

    def changes(self) -> tuple[str, str] | None:
        """Of the document that was changed last, for a sample in the manifest: what was done, and to which text; None:
        none is shown.
        """
        return None

    def details(self) -> dict[str, str]:
        """More for the manifest's sample of the document that was left out, or shown, last."""
        return {}

    def told(self) -> dict[str, Any]:
        """More for the manifest, as JSON."""
        return {}

    @classmethod
    def files(cls, settings: Any) -> list[DataFile]:
        """What the rule reads besides: a corpus is another when they change."""
        return []

    @classmethod
    def versions(cls) -> dict[str, str]:
        """Libraries whose version can change what comes out."""
        return {}


def chosen(config: CorpusConfig) -> list[tuple[str, type[Rule], Section]]:
    """The rules of a corpus, in their order."""
    found = [(name, rooms.RULES.get(name), settings) for name, settings in config.rules.chosen().items()]
    return sorted(found, key=lambda rule: (rule[1].order, rule[0]))
