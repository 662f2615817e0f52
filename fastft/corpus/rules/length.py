"""Documents that are too short or too long."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.rules.base import Document, Rule, rising


class LengthSettings(Section):
    """Limits; null: none."""

    min_characters: int | None = Field(20, ge=0, description="Fewest characters.")
    max_characters: int | None = Field(None, ge=1, description="Most characters.")
    min_words: int | None = Field(None, ge=0, description="Fewest words.")
    max_words: int | None = Field(None, ge=1, description="Most words.")

    @model_validator(mode="after")
    def _rising(self) -> Self:
        rising(self, ("min_characters", "max_characters"), ("min_words", "max_words"))
        return self


@rooms.RULES.register("length")
class Length(Rule):
    """Leaves out documents by their length."""

    Settings = LengthSettings
    order = 40

    def __init__(self, settings: LengthSettings):
        super().__init__(settings)
        self.characters = settings.min_characters, settings.max_characters
        self.words = settings.min_words, settings.max_words

    def apply(self, document: Document) -> str | None:
        if said := self._beyond(len(document.text), *self.characters, "characters"):
            return said
        if self.words == (None, None):
            return None
        return self._beyond(len(document.words), *self.words, "words")

    @staticmethod
    def _beyond(found: int, least: int | None, most: int | None, what: str) -> str | None:
        if least is not None and found < least:
            return f"fewer than {least:,} {what}"
        return f"more than {most:,} {what}" if most is not None and found > most else None
