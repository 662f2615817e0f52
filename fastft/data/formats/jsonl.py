"""JSON lines: one object a line."""

import json
from collections import Counter
from typing import Any

from fastft.data.formats.base import open_text, reader
from fastft.errors import UserError


class _Ambiguous(dict):
    """An object with two values under the key ``twice``."""

    twice: str


def no_key_twice(pairs: list[tuple[str, object]]) -> dict:
    """An object of JSON; one with a key twice is marked, for ``check_object`` to refuse."""
    record = dict(pairs)
    if len(record) == len(pairs):
        return record
    found = _Ambiguous(record)
    found.twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
    return found


DEEPEST = 500  # Python's decoder takes some 1,000, less what is called around it
_decode = json.JSONDecoder(object_pairs_hook=no_key_twice).decode


@reader("jsonl", ".jsonl", ".ndjson")
def read(path, source):
    with open_text(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, parse(where, line)


def parse(where: str, line: str) -> Any:
    """The object of a line. UserError, beginning with ``where``, for a line that is none."""
    try:
        record = _decode(line)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply.", "Fix or remove this line.") from None
    except ValueError as e:
        if not isinstance(e, json.JSONDecodeError):  # Python refuses to read an integer of thousands of digits
            raise UserError(f"{where}: {e}.", "Fix or remove this line.") from None
        near = line[max(0, e.pos - 30) : e.pos + 30].strip()
        raise UserError(
            f"{where}: broken JSON: {e.msg} at column {e.colno}: {near!r}",
            "Each line must be one JSON object; fix or remove this line.",
        ) from None
    if line.count("[") + line.count("{") > DEEPEST and _deeper(record):
        raise UserError(f"{where}: nested more than {DEEPEST} deep.", "Fix or remove this line.")
    check_object(where, record)
    return record


def _deeper(value: Any) -> bool:
    """Whether a value is nested more than ``DEEPEST`` deep, which does not depend on where it is read."""
    level = [value]
    for _ in range(DEEPEST):
        inner = (v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list))
        level = [value for values in inner for value in values]
    return any(isinstance(value, dict | list) for value in level)


def check_object(where: str, record: object) -> None:
    """UserError unless a row is an object whose keys are there once."""
    if not isinstance(record, dict):
        raise UserError(
            f"{where}: expected a JSON object, got {type(record).__name__}.",
            'Each row must be an object such as {"text": "..."}.',
        )
    if isinstance(record, _Ambiguous):
        raise UserError(f"{where}: the key {record.twice!r} appears twice.", "Fix or remove this row.")
