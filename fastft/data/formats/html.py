"""Web pages: the text of the body, a file each. Scripts, styles and tags are left out; menus and footers are not."""

import re
from html.parser import HTMLParser

from fastft.data.formats.base import read_whole, reader

BLOCKS = re.compile(
    r"address|article|aside|blockquote|body|br|d[dlt]|div|fieldset|figcaption|figure|footer|form|h[1-6r]|header|li|main|nav"
    r"|[ou]l|option|p|pre|section|t(able|body|d|foot|h|head|itle|r)"
)
HIDDEN = frozenset(("script", "style", "noscript", "template", "svg"))


@reader("html", ".html", ".htm", ".xhtml")
def read(path, source):
    parser = _Text()
    parser.feed(read_whole(path))
    parser.close()
    yield f"{path}", {"text": parser.text(), "title": parser.title.strip()}


class _Text(HTMLParser):
    """Collects what a reader would see, a line for each block."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.title = ""
        self.hidden = 0  # open tags whose content is not shown
        self.in_title = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hidden += tag in HIDDEN
        self.in_title = tag == "title"
        if BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in HIDDEN:
            self.hidden = max(0, self.hidden - 1)
        self.in_title = False
        if BLOCKS.fullmatch(tag):
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.in_title:
            self.title += data
        elif not self.hidden:
            self.parts.append(data)

    def text(self) -> str:
        lines = (" ".join(line.split()) for line in "".join(self.parts).split("\n"))
        return "\n".join(line for line in lines if line)
