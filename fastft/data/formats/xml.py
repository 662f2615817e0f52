"""XML: the text of every element that source.element names, or of the whole file."""

from typing import Any, TextIO
from xml.etree import ElementTree

from fastft.data.formats.base import open_text, reader, utf8_size
from fastft.errors import UserError


@reader("xml", ".xml")
def read(path, source):
    most = getattr(path, "most_text", None)
    number, depth = 0, 0
    root: Any = None
    with open_text(path) as f:
        content = _Metered(f, path, most)
        try:
            for event, node in ElementTree.iterparse(content, events=("start", "end")):
                if event == "start":
                    root = node if root is None else root
                    wanted = source.element is None or _name(node) == source.element
                    depth += depth > 0 or wanted  # within one that is wanted, all is part of it
                    continue
                if depth:
                    depth -= 1
                    if depth:
                        continue
                    number += 1
                    text = "\n".join(part for part in (" ".join(t.split()) for t in node.itertext()) if part)
                    record = {"text": text, **{key: value for key, value in node.attrib.items() if key != "text"}}
                    yield f"{path}:row {number}", record
                root.clear()  # what was read is let go
                content.held = 0
        except ElementTree.ParseError as e:
            raise UserError(f"{path}: broken XML: {e}.", "Fix the file, or leave it out.") from None


class _Metered:
    """A text file of which at most so many bytes are read until some are let go."""

    def __init__(self, f: TextIO, path: object, most: int | None):
        self.f, self.path, self.most, self.held = f, path, most, 0

    def read(self, size: int = -1) -> str:
        text = self.f.read(size)
        self.held += utf8_size(text)
        if self.most is not None and self.held > self.most + 4 * size:
            raise UserError(
                f"{self.path}: an element holds more than {self.most:,} bytes.",
                "Raise max_document_bytes, or name smaller elements with element in the source.",
            )
        return text


def _name(node: ElementTree.Element) -> str:
    return str(node.tag).rpartition("}")[2]
