"""Plain text: documents end at a blank line, at every line, or at the file's end (source.documents)."""

from fastft.data.formats.base import open_text, reader


@reader("txt", ".txt", ".text", ".md", ".rst", ".py")
def read(path, source):
    with open_text(path) as f:
        if source.documents == "file":
            yield f"{path}", {"text": f.read()}
        elif source.documents == "line":
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{path}:{number}", {"text": line.rstrip("\n")}
        else:
            lines: list[str] = []
            start = 1
            for number, line in enumerate(f, 1):
                if line.strip():
                    if not lines:
                        start = number
                    lines.append(line)
                elif lines:
                    yield f"{path}:{start}", {"text": "".join(lines).rstrip("\n")}
                    lines = []
            if lines:
                yield f"{path}:{start}", {"text": "".join(lines).rstrip("\n")}
