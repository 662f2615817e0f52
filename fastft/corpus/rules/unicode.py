"""One form for each character."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from pydantic import Field

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.rules.base import Document, Rule

# Controls but tab and line feed, zero-width space, joiners' kin that mark direction, soft hyphen, byte-order mark.
NOT_SEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff]")


class UnicodeSettings(Section):
    """The normal form."""

    form: Literal["NFC", "NFKC"] = Field(
        "NFC", description="NFC composes accents; NFKC also replaces ligatures, full-width letters and the like."
    )
    remove_controls: bool = Field(True, description="Remove characters that are not seen (controls, zero-width ones).")

    scalar = "form"


@rooms.RULES.register("unicode")
class Unicode(Rule):
    """Unicode's normal form, ends of lines as line feeds, and no characters that are not seen."""

    Settings = UnicodeSettings
    order = 20

    def __init__(self, settings: UnicodeSettings):
        super().__init__(settings)
        self.form, self.remove = settings.form, settings.remove_controls

    def apply(self, document: Document) -> str | None:
        text = document.text
        if "\r" in text:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if not text.isascii() and not unicodedata.is_normalized(self.form, text):
            text = unicodedata.normalize(self.form, text)
        if self.remove and not text.replace("\n", "").isprintable():  # which is told four times as fast as found
            text = NOT_SEEN.sub("", text)
        if text is not document.text:
            document.text = text
        return None

    @classmethod
    def versions(cls) -> dict[str, str]:
        return {"unicode": unicodedata.unidata_version}
