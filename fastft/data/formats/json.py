"""JSON files: an array of objects, or (under the same suffix) JSON lines."""

import json

from fastft.data.formats import jsonl
from fastft.data.formats.base import open_text, read_whole, reader
from fastft.errors import UserError


@reader("json", ".json")
def read(path, source):
    with open_text(path) as f:
        start = next((c for c in iter(lambda: f.read(1), "") if not c.isspace()), "")
    if start != "[":
        yield from _lines(path, source)
        return
    text = read_whole(path)
    try:
        items = json.loads(text, object_pairs_hook=jsonl.no_key_twice)
    except RecursionError:
        raise UserError(f"{path}: nested too deeply.", "Fix the file.") from None
    except ValueError as e:
        where = f":{e.lineno}" if isinstance(e, json.JSONDecodeError) else ""
        raise UserError(
            f"{path}{where}: broken JSON: {e}", "The file must be an array of objects; fix it there."
        ) from None
    for number, record in enumerate(items, 1):
        where = f"{path}:row {number}"
        jsonl.check_object(where, record)
        yield where, record


def _lines(path, source):
    """JSON lines; a single object over several lines is told from them."""
    with open_text(path) as f:
        first = f.readline().strip()
    if first == "{":
        raise UserError(
            f"{path}: holds one JSON object, not an array of them.",
            'Give an array of rows, [{"text": "..."}, ...], or one object a line.',
        )
    yield from jsonl.read(path, source)
