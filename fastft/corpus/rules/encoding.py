"""Text that was decoded wrongly."""

from __future__ import annotations

from pydantic import Field

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.rules.base import Document, Rule
from fastft.data.formats.base import DATA_EXTRA
from fastft.errors import UserError


class EncodingSettings(Section):
    """How much of a text may be lost."""

    max_replaced: float = Field(
        0.001, ge=0, le=1, description="Largest share of characters that are U+FFFD, which stands for lost ones."
    )


@rooms.RULES.register("encoding")
class Encoding(Rule):
    """Repairs text that was decoded in a wrong encoding ("schÃ¶n"), by ftfy, line by line; leaves out what is lost."""

    Settings = EncodingSettings
    order = 10

    def __init__(self, settings: EncodingSettings):
        super().__init__(settings)
        self.most = settings.max_replaced
        try:
            from ftfy import fix_encoding
            from ftfy.badness import is_bad
        except ImportError:
            raise UserError("rules.encoding: ftfy is not installed.", DATA_EXTRA) from None
        self.fix, self.is_bad = fix_encoding, is_bad

    def apply(self, document: Document) -> str | None:
        text = document.text
        if text.isascii():
            return None
        if text.count("\ufffd") > self.most * len(text):
            return "replacement characters"
        lines = text.split("\n")
        bad = [i for i, line in enumerate(lines) if not line.isascii() and self.is_bad(line)]
        for i in bad:
            lines[i] = self.fix(lines[i])
        if bad:
            document.text = "\n".join(lines)
        return None

    @classmethod
    def versions(cls) -> dict[str, str]:
        from importlib.metadata import version

        return {"ftfy": version("ftfy")}
