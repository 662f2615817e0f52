"""A configuration's text: YAML, strictly read, with dotted overrides; nothing is validated here."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from fastft.config.base import short_list
from fastft.config.sections import Data, Model, Trackers
from fastft.errors import UserError, did_you_mean

# PyYAML lets through what int(), datetime() and Python's stack say of a value; UnicodeDecodeError is a ValueError.
BROKEN_YAML = (yaml.YAMLError, ValueError, RecursionError)


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """The mapping in a YAML file with its overrides, not validated. Raises UserError."""
    path = Path(path)
    if path.is_dir():
        raise _a_folder(path)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such configuration file.", near)
    try:
        raw = _parsed(path.read_text(encoding="utf-8"), str(path))
    except BROKEN_YAML as e:
        raise UserError(f"{path}: not valid YAML: {e}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path}: expected a mapping of sections, got {type(raw).__name__}.",
            "`fastft config init TASK` prints one to start from.",
        )
    for override in overrides:
        _apply_override(raw, override)
    return raw


def _a_folder(path: Path) -> UserError:
    """What to do with a folder that stands where a configuration file belongs."""
    message = f"{path}: is a folder, not a configuration file."
    if (path / "config.yaml").is_file():
        return UserError(
            message,
            f"It is a run's: fastft resume {path} goes on with it; {path / 'config.yaml'} is its configuration.",
        )
    files = sorted(str(file) for file in path.glob("*.y*ml"))
    return UserError(message, f"In it there are: {', '.join(files[:20])}." if files else "Give a YAML file.")


class _UniqueKeyLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key written twice (YAML itself would keep the last in silence), and reads 2e-5
    as a number.
    """

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (dict, list, set)):
                raise yaml.constructor.ConstructorError(
                    None,
                    None,
                    f"a {type(key).__name__} stands where a key belongs (a template's braces?)",
                    key_node.start_mark,
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 2e-5 for a string, since it wants a dot and a sign; every fine-tuning file has one.
_UniqueKeyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*)(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def _parsed(text: str, name: str) -> Any:
    """``name``: what errors call the text. Raises what ``BROKEN_YAML`` lists."""
    loader = _UniqueKeyLoader(text)
    loader.name = name
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _apply_override(raw: dict, override: str) -> None:
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise UserError(f"Override {override!r} is not of the form section.key=value.", "For example: optim.lr=2e-5")
    try:
        value = _parsed(text, f"{key}=")
    except BROKEN_YAML as e:
        raise UserError(f"Override {override!r}: the value is not valid YAML: {e}") from None
    set_value(raw, key, value, f"Override {override!r}")


OF_PATHS = ("data.train", "sources")  # lists in which a path stands for files


def _entry(entries: list, name: str, key: str, where: str, inside: bool = True) -> Any:
    """An entry of a list (``data.train``), by its number from 0; a path alone becomes a mapping. UserError for none,
    and where something ``inside`` an entry is meant that has no keys.
    """
    if not name.isdecimal() or int(name) >= len(entries):
        raise UserError(
            f"{where}: {key!r} is a list of {len(entries)} in the file, which has no {name!r}.",
            f"Its entries have numbers: {key}.0 is the first; {key}='[...]' replaces the list.",
        )
    entry = entries[int(name)]
    if isinstance(entry, str) and key in OF_PATHS:
        entry = entries[int(name)] = {"path": entry}
    if inside and not isinstance(entry, dict | list):
        raise UserError(
            f"{where}: {key}.{name} is {entry!r} in the file, not a section.", f"Give the whole: {key}='[...]'."
        )
    return entry


def set_value(raw: dict, key: str, value: Any, where: str) -> None:
    """Set a dotted key of a plain mapping, its sections made as needed; entries of lists by their numbers
    (``data.train.0.weight``). UserError, which begins with ``where``, when one of them is no section.
    """
    *parents, last = key.split(".")
    node: Any = raw
    for depth, name in enumerate(parents):
        if isinstance(node, list):
            node = _entry(node, name, ".".join(parents[:depth]), where)
            continue
        child = node.setdefault(name, {})
        if name == "trackers" and isinstance(child, (str, list)):
            child = node[name] = short_list(Trackers, child)
        if name == "model" and node is raw and isinstance(child, str):
            child = node[name] = {Model.scalar: child}
        if child is None or child is True:
            child = node[name] = {}
        if not isinstance(child, (dict, list)):
            shown = child if isinstance(child, (str, int, float)) else f"a {type(child).__name__}"
            raise UserError(
                f"{where}: {name!r} is {shown} in the file, not a section.",
                f"Write it there as a mapping: {name}: {{{last}: ...}}",
            )
        node = child
    if isinstance(node, list):
        _entry(node, last, ".".join(parents), where, inside=False)
        node[int(last)] = value
        return
    if parents == ["data"]:  # an override by an older name beside the file's newer one, or the other way round
        for names in Data.aliases.items():
            if last in names:
                node.pop(names[0], None)
                node.pop(names[1], None)
    node[last] = value
