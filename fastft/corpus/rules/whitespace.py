"""White space."""

from __future__ import annotations

import re

from pydantic import Field

from fastft import rooms
from fastft.config.base import Section
from fastft.corpus.rules.base import Document, Rule

OTHERS = "\t\v\f\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
RUNS = re.compile(f"[ {OTHERS}]{{2,}}|[{OTHERS}]")
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
            if "  " in text or any(space in text for space in OTHERS[: 3 if text.isascii() else None]):
                text = RUNS.sub(" ", text)
            if " \n" in text or "\n " in text:
                text = AROUND.sub("\n", text)
        if self.blank + "\n" in text:
            text = self.many.sub(self.blank, text)
        text = text.strip("\n") if self.indentation else text.strip()
        if text != document.text:
            document.text = text
        return None
