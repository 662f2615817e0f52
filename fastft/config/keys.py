"""Every key that a configuration can have: what the schema, `fastft config explain` and the reference are made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo
from pydantic.json_schema import GenerateJsonSchema

from fastft import rooms
from fastft.config.base import Section, optional
from fastft.config.sections import Config
from fastft.registry import Registry

# Numbers and booleans as YAML 1.1 and 1.2 write them: what is a number to one is a text to the other.
NUMBER = r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9_]+)([eE][-+]?[0-9]+)?$"
INTEGER = r"^[-+]?[0-9][0-9_]*(\.0*)?([eE]\+?[0-9]+)?$"
BOOLEAN = r"^([Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF|[Tt]rue|TRUE|[Ff]alse|FALSE)$"


@dataclass(frozen=True)
class Part:
    """A section whose class another key chooses.

    Attributes
    ----------
    path, by : str
        Keys of the section and of the name.
    members : Registry
        What the name is looked up in.
    section : callable
        The section's class, of a member.
    default : str or None
        The name where none is given.
    """

    path: str
    by: str
    members: Registry
    section: Callable[[Any], type[Section]]

    def variants(self) -> dict[str, type[Section]]:
        return {name: self.section(self.members.get(name)) for name in self.members.names()}


PARTS = {
    part.path: part
    for part in (
        Part("data", "task", rooms.TASKS, lambda task: task.Data),
        Part("loss", "task", rooms.TASKS, lambda task: task.Loss),
        Part("evaluation", "task", rooms.TASKS, lambda task: task.Evaluation),
        Part("optim", "optim.name", rooms.OPTIMIZERS, lambda spec: spec.Settings),
        Part("data.order", "data.order.name", rooms.ORDERS, lambda order: order.Settings),
    )
}
NAMES = {part.by: part.members for part in PARTS.values()}  # keys whose values are the names of a table's members


@dataclass(frozen=True)
class Key:
    """A key of the configuration, with what is said of it.

    Attributes
    ----------
    path : str
        With its sections: ``optim.warmup``.
    kind : str
        Type and bounds, in words; "section" for a section.
    default : str
        As YAML flow style; "" for a section that is always there; "required".
    choices : tuple of str
        All values, where there is a list of them.
    used : tuple of str
        The members that have it, as ``task: classification``; empty: every run.
    """

    path: str
    kind: str
    default: str
    choices: tuple[str, ...]
    description: str
    used: tuple[str, ...] = ()

    @property
    def section(self) -> str:
        return self.path.rpartition(".")[0]

    @property
    def name(self) -> str:
        return self.path.rpartition(".")[2]


def keys(of: type[Section] = Config) -> list[Key]:
    """All of them, in the order of the file; one that several members share is there once."""
    merged: dict[tuple, Key] = {}
    for key in _walk(of, "", ()):
        same = (key.path, key.kind, key.default, key.description)
        before = merged.get(same)
        merged[same] = replace(before, used=(*before.used, *key.used)) if before else key
    return [replace(key, used=_unless_all(key)) for key in merged.values()]


def _unless_all(key: Key) -> tuple[str, ...]:
    """Members that have a key; none where all of them do."""
    used = tuple(dict.fromkeys(key.used))
    by = {name.partition(": ")[0] for name in used}
    whole = {f"{chooser}: {name}" for chooser in by for name in NAMES[chooser].names()}
    return () if set(used) == whole else used


def _walk(cls: type[Section], where: str, used: tuple[str, ...]) -> Iterator[Key]:
    for name, field in cls.model_fields.items():
        path, kind = where + name, field.annotation
        if path in PARTS:
            yield Key(path, "section", "", (), field.description or about(Config, name), used)
            for member, section in PARTS[path].variants().items():
                yield from _walk(section, f"{path}.", (f"{PARTS[path].by}: {member}",))
        elif isinstance(kind, type) and issubclass(kind, Section):
            yield Key(path, "section", "", (), field.description or summary(kind), used)
            yield from _walk(kind, f"{path}.", used)
        elif (below := optional(kind)) is not None:
            yield Key(path, "section", "null", (), field.description or summary(below), used)
            yield from _walk(below, f"{path}.", used)
        else:
            yield _leaf(field, path, used)
            if (items := items_of(kind)) is not None:
                yield from _walk(items, f"{path}.", ())
    for name in cls.members.names() if cls.members else []:
        entry = cls.members.get(name)  # type: ignore[union-attr]
        yield Key(f"{where}{name}", "section", "null", (), summary(entry), used)
        yield from _walk(entry.Settings, f"{where}{name}.", used)


def _leaf(field: FieldInfo, path: str, used: tuple[str, ...]) -> Key:
    found = schema_of(field)
    choices = NAMES[path].names() if path in NAMES else found.get("enum", ())
    kind = "source, or a list or mapping of them" if path == "data.eval" else in_words(found)
    kind = "source, or a list of them" if path == "data.train" else kind
    default = "required" if field.is_required() else shown(default_of(field))
    return Key(path, kind, default, tuple(map(str, choices)), field.description or "", used)


def items_of(kind: Any) -> type[Section] | None:
    """The section of a type that is a list of them."""
    items = get_args(kind)[0] if get_origin(kind) is list else None
    return items if isinstance(items, type) and issubclass(items, Section) else None


def about(cls: type[Section], name: str) -> str:
    """What a section of the configuration is for, whichever class it has."""
    kind: Any = type(cls.model_fields[name].get_default(call_default_factory=True))
    return summary(kind)


def summary(documented: Any) -> str:
    """The first paragraph of a class's docstring, on one line."""
    return " ".join((documented.__doc__ or "").strip().split("\n\n")[0].split())


def default_of(field: FieldInfo) -> Any:
    value = field.get_default(call_default_factory=True)
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value


def shown(value: Any) -> str:
    """A default as a file would say it."""
    return value if isinstance(value, str) else json.dumps(value)


class Loose(GenerateJsonSchema):
    """Numbers and booleans may be texts: to a reader of YAML 1.1, ``1e-4`` is one; to one of 1.2, ``yes`` is."""

    def float_schema(self, schema):
        return {**super().float_schema(schema), "type": ["number", "string"], "pattern": NUMBER}

    def int_schema(self, schema):
        return {**super().int_schema(schema), "type": ["integer", "string"], "pattern": INTEGER}

    def bool_schema(self, schema):
        return {"type": ["boolean", "string"], "pattern": BOOLEAN}

    def tuple_schema(self, schema):
        found = super().tuple_schema(schema)
        return {"items": found.pop("prefixItems"), **found} if "prefixItems" in found else found


def schema_of(field: FieldInfo) -> dict:
    """JSON Schema of what a file may say for a field, short forms included."""
    kind: Any = field.annotation
    for mark in field.metadata:
        kind = Annotated[kind, mark]
    return TypeAdapter(kind).json_schema(schema_generator=Loose)


BOUNDS = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
}


def in_words(schema: dict) -> str:
    """The type that a JSON Schema of one value stands for: ``number, above 0``."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(in_words(part) for part in schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        return " or ".join(shown(value) for value in schema.get("enum", [schema.get("const")]))
    kind = "mapping" if "$ref" in schema else schema.get("type", "any value")
    kind = {"null": "null", "array": "list", "object": "mapping"}.get(*[kind if isinstance(kind, str) else kind[0]] * 2)
    items = schema.get("items")
    if kind == "list" and isinstance(items, list):
        kind = f"list of {len(items)} values, each {in_words(items[0])}"
    elif kind == "list" and items:
        kind = f"list, each {in_words(items)}"
    bounds = (words.format(f"{schema[b]:,g}") for b, words in BOUNDS.items() if abs(schema.get(b, 2**63)) < 2**63)
    return ", ".join([kind, *bounds])
