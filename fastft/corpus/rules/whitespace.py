"""White space."""

from __future__ import annotations

import re

from pydantic import Field

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.rules.base import Document, Rule

RUNS = re.compile(
    r"[ \t\v\f\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]{2,}|[\t\v\f\u00a0\u1680\u2000-\u200a\u202f\u205f]"
)
AROUND = re.compile(r" +\n| *\n +")


class WhitespaceSettings(Section):
    """What stays."""

    indentation: bool = Field(False, description="Keep the white space at the beginning of lines (code, verse).")
    blank_lines: int = Field(1, ge=0, description="Most blank lines in a row.")


@rooms.RULES.register("whitespace")
class Whitespace(Rule):
    """One space for a run of white space, none around lines, and few blank lines."""

    Settings = WhitespaceSettings
    order = 30

    def __init__(self, settings: WhitespaceSettings):
        super().__init__(settings)
        self.indentation = settings.indentation
        self.blank = "\n" * (settings.blank_lines + 1)
        self.many = re.compile(f"\n{{{settings.blank_lines + 2},}}")

    def apply(self, document: Document) -> str | None:
        text = document.text
        if self.indentation:
            text = "\n".join(line.rstrip() for line in text.split("\n"))
        else:
            text = AROUND.sub("\n", RUNS.sub(" ", text)) if "\n" in text else RUNS.sub(" ", text)
        text = self.many.sub(self.blank, text)
        text = text.strip("\n") if self.indentation else text.strip()
        if text != document.text:
            document.text = text
        return None
