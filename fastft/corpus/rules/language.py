"""Documents in other languages."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.rules.base import Document, Rule
from fastft.data.formats.base import DATA_EXTRA
from fastft.errors import UserError, did_you_mean


class LanguageSettings(Section):
    """Which languages stay."""

    keep: list[str] = Field(min_length=1, description="ISO 639-1 codes: [en, de].")
    min_confidence: float = Field(0.5, ge=0, le=1, description="How sure it must be that it is one of them.")
    characters: int = Field(500, ge=20, description="Characters of a document that are looked at.")

    scalar = "keep"


@rooms.RULES.register("language")
class Language(Rule):
    """Leaves out documents in other languages, told by lingua's models of letter triples."""

    Settings = LanguageSettings
    order = 70

    def __init__(self, settings: LanguageSettings):
        super().__init__(settings)
        try:
            import lingua
        except ImportError:
            raise UserError("rules.language: lingua-language-detector is not installed.", DATA_EXTRA) from None
        known: dict[str, Any] = {lang.iso_code_639_1.name.lower(): lang for lang in lingua.Language.all()}
        for code in settings.keep:
            if code not in known:
                raise UserError(f"rules.language.keep: {code!r} is no language known.", did_you_mean(code, known))
        self.keep = {known[code] for code in settings.keep}
        self.least, self.characters = settings.min_confidence, settings.characters
        builder = lingua.LanguageDetectorBuilder.from_all_languages()
        self.detector = builder.with_low_accuracy_mode().build()

    def apply(self, document: Document) -> str | None:
        found = self.detector.compute_language_confidence_values(document.text[: self.characters])
        if sum(one.value for one in found if one.language in self.keep) >= self.least:
            return None
        return f"language {found[0].language.iso_code_639_1.name.lower()}" if found else "no language"

    @classmethod
    def versions(cls) -> dict[str, str]:
        from importlib.metadata import version

        return {"lingua-language-detector": version("lingua-language-detector")}
