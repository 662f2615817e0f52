"""JSON lines: one object a line."""

import json

from fastft.data.formats.base import open_text, reader
from fastft.errors import UserError


def _object(pairs: list[tuple[str, object]]) -> dict:
    """An object; of two values under one key neither is the right one."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in one object")
    return record


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


@reader("jsonl", ".jsonl", ".ndjson")
def read(path, source):
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                record = _decode(line)
            except RecursionError:
                raise UserError(f"{path}:{number}: nested too deeply.", "Mend or remove this line.") from None
            except ValueError as e:
                if not isinstance(e, json.JSONDecodeError):  # a key twice; Python refuses to read an integer of thousands of digits
                    raise UserError(f"{path}:{number}: {e}.", "Mend or remove this line.") from None
                raise UserError(f"{path}:{number}: broken JSON: {e.msg} at column {e.colno}: {line[max(0, e.pos - 30):e.pos + 30].strip()!r}",
                                "Each line must be one JSON object; mend or remove this line.") from None
            if not isinstance(record, dict):
                raise UserError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}.",
                                'Each line must be an object such as {"text": "..."}.')
            yield f"{path}:{number}", record
