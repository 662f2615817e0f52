"""Documents that do not read like prose."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.rules.base import Document, Rule, rising

BULLETS = ("•", "‣", "▪", "●", "-", "*", "◦", "–")
ELLIPSES = ("...", "…")


class QualitySettings(Section):
    """Limits; those of Rae et al. 2021 (Gopher, arXiv 2112.11446, table A1) are the defaults."""

    min_words: int = Field(50, ge=0, description="Fewest words.")
    max_words: int = Field(100_000, ge=1, description="Most words.")
    min_word_length: float = Field(3, ge=0, description="Least mean length of words.")
    max_word_length: float = Field(10, ge=0, description="Largest mean length of words.")
    max_symbols: float = Field(0.1, ge=0, description="Most # and ellipses to a word.")
    max_bullets: float = Field(0.9, ge=0, le=1, description="Largest share of lines that begin with a bullet.")
    max_ellipses: float = Field(0.3, ge=0, le=1, description="Largest share of lines that end with an ellipsis.")
    min_letters: float = Field(0.8, ge=0, le=1, description="Least share of words that have a letter.")
    stop_words: list[str] = Field(
        ["the", "be", "to", "of", "and", "that", "have", "with"], description="Words that prose of the language has."
    )
    min_stop_words: int = Field(2, ge=0, description="Fewest of them; 0 for other languages than their own.")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        rising(self, ("min_words", "max_words"), ("min_word_length", "max_word_length"))
        if self.min_stop_words > len(set(self.stop_words)):
            raise ValueError(f"min_stop_words: {self.min_stop_words} of {len(set(self.stop_words))} stop_words")
        return self


@rooms.RULES.register("quality")
class Quality(Rule):
    """Leaves out what does not read like prose: by length and shape of words, symbols, bullets, stop words."""

    Settings = QualitySettings
    order = 60

    def __init__(self, settings: QualitySettings):
        super().__init__(settings)
        self.limits, self.stop = settings, frozenset(settings.stop_words)

    def apply(self, document: Document) -> str | None:
        limits, text, words = self.limits, document.text, document.words
        count = len(words)
        if not limits.min_words <= count <= limits.max_words or not count:
            return "number of words"
        if not limits.min_word_length <= sum(map(len, words)) / count <= limits.max_word_length:
            return "mean length of words"
        if text.count("#") > limits.max_symbols * count:
            return "number signs"
        if text.count("...") + text.count("…") > limits.max_symbols * count:
            return "ellipses"
        lines = document.lines
        if sum(line.startswith(BULLETS) for line in lines) > limits.max_bullets * len(lines):
            return "lines that begin with a bullet"
        if sum(line.endswith(ELLIPSES) for line in lines) > limits.max_ellipses * len(lines):
            return "lines that end with an ellipsis"
        least = limits.min_letters * count
        begin = sum(map(str.isalpha, [word[0] for word in words]))  # nearly all that have one
        if begin < least and sum(any(map(str.isalpha, word)) for word in words) < least:
            return "words without letters"
        if limits.min_stop_words and len(self.stop.intersection(words)) < limits.min_stop_words:
            return "stop words"
        return None
