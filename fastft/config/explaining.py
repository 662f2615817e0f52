"""What is said of a configuration's mistakes: pydantic's errors by the keys of the file, a line each."""

from __future__ import annotations

from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from fastft.config.base import Section
from fastft.config.keys import NAMES
from fastft.config.reference import instead

SHOULD = "Input should be "


def explained(error: ValidationError, cls: type[Section]) -> list[str]:
    """A line for each key that is wrong, in the order of the file; ``cls``: what was validated."""
    found: dict[str, list[tuple[str, str]]] = {}
    for one in error.errors():
        key, line = _explain(one, cls)
        found.setdefault(key, []).append((one["type"], line))
    return [_joined(key, lines) for key, lines in found.items()]


def _joined(key: str, errors: list[tuple[str, str]]) -> str:
    """One line of a key. ``errors``: kind and text; where it may be one of several types, each has one, and those of
    types that the value has not are of no use beside another.
    """
    near = [line for kind, line in errors if not kind.endswith("_type")]
    lines = list(dict.fromkeys(near or [line for _, line in errors]))
    if len(lines) > 1 and all(line.startswith(SHOULD) for line in lines):
        whole = [line.rpartition(" (got ") for line in lines]
        if all(before for before, _, _ in whole) and len({got for _, _, got in whole}) == 1:
            said = ", or ".join(before.removeprefix(SHOULD) for before, _, _ in whole)
            lines = [f"{SHOULD}{said} (got {whole[0][2]}"]
    return "; ".join(f"{key}: {line}" if key else line for line in lines)


def _explain(error: Any, cls: type[Section]) -> tuple[str, str]:
    """The key, and what is wrong with it."""
    parts, kinds = _place(error["loc"], cls)
    key = ".".join(parts)
    if error["type"] == "extra_forbidden":
        return key, f"unknown key. {instead(key, _keys_of(kinds[-1]))}"
    if error["type"] == "missing":
        known = f" Known: {', '.join(NAMES[key].names())}." if key in NAMES else ""
        return key, f"required, but not there.{known}"
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(error.get("input"))
    if error["type"] == "value_error" or len(shown) > 80:
        return key, message
    return key, f"{message} (got {shown})"


def _place(loc: tuple, cls: type[Section]) -> tuple[list[str], list[Any]]:
    """The keys that a location leads through, and the type in front of each; without pydantic's own names of the types
    that a value may have (``constrained-int``).
    """
    kind: Any = cls
    parts, kinds = list[str](), list[Any]()
    for part in loc:
        options = _options(kind)
        sections = [one for one in options if _is_section(one)]
        below = next((one.model_fields[part].annotation for one in sections if part in one.model_fields), None)
        if below is None and isinstance(part, int):
            below = next((get_args(one)[0] for one in options if get_origin(one) in (list, tuple)), Any)
        elif below is None:
            below = next((get_args(one)[1] for one in options if get_origin(one) is dict), None)
        if below is None and not sections:
            continue
        if below is None and (named := [one for one in sections if one.__name__ == part]):
            kind = named[0]
            continue
        parts.append(str(part))
        kinds.append(kind)
        kind = Any if below is None else below
    return parts, kinds or [cls]


def _options(kind: Any) -> list[Any]:
    """The types that a value may have."""
    if get_origin(kind) is Annotated:
        return _options(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [one for option in get_args(kind) for one in _options(option)]
    return [kind]


def _keys_of(kind: Any) -> list[str]:
    """Field names of a section, with those that its members would add."""
    found: dict[str, None] = {}
    for one in _options(kind):
        if _is_section(one):
            found |= dict.fromkeys([*one.model_fields, *(one.members.names() if one.members else [])])
    return list(found)


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
