"""The configuration as a JSON Schema, which editors complete and check files by: it takes what ``load`` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastft.config.base import Section, optional
from fastft.config.keys import BOOLEAN, NAMES, PARTS, Part, about, default_of, schema_of, summary
from fastft.config.sections import Config

NEEDED = ("version", "task", "model")  # sections and keys that must not be left empty


def json_schema(formats: Sequence[str] = (), of: type[Section] = Config) -> dict[str, Any]:
    """Draft 7. ``formats``: names of the formats that data files can have. ``of``: what the file holds."""
    title = "fastft" if of is Config else "fastft prepare"
    return {"$schema": "http://json-schema.org/draft-07/schema#", "title": title, **_Builder(formats).whole(of)}


class _Builder:
    """Collects the definitions that sections refer to."""

    def __init__(self, formats: Sequence[str]):
        self.formats = ["auto", *formats]
        self.definitions: dict[str, Any] = {}

    def whole(self, of: type[Section]) -> dict[str, Any]:
        found = self.section(of, "")
        parts = [(path, part) for path, part in PARTS.items() if part.by == "task"] if of is Config else []
        rules = [rule for path, part in parts for rule in self.rules(part, path)]
        for definition in self.definitions.values():
            if "format" in definition.get("properties", {}) and len(self.formats) > 1:
                definition["properties"]["format"]["enum"] = self.formats
        conditions = {"allOf": rules} if rules else {}
        return {**found, **conditions, "$defs": dict(sorted(self.definitions.items()))}

    def section(self, cls: type[Section], where: str, empty: bool = False) -> dict[str, Any]:
        """A section's mapping; ``empty``: or nothing, which is all its defaults."""
        properties = {name: self.field(cls, name, where) for name in cls.model_fields}
        for name in cls.members.names() if cls.members else []:
            entry = cls.members.get(name)  # type: ignore[union-attr]
            properties[name] = self.switched(entry.Settings, f"{where}{name}.", summary(entry))
        for old, new in cls.aliases.items():
            said = f"Older name of {new}."
            properties[old] = {**properties[new], "description": said, "deprecationMessage": said}
        required = [name for name, field in cls.model_fields.items() if field.is_required()]
        found: dict[str, Any] = {
            "type": ["object", "null"] if empty else "object",
            "description": summary(cls),
            "properties": properties,
            "additionalProperties": False,
            **({"required": required} if required else {}),
        }
        short = self.short(cls, properties)
        return {"anyOf": [found, *short]} if short else found

    def switched(self, cls: type[Section], where: str, description: str) -> dict[str, Any]:
        """A section that may be left out, and turned on or off by true or false."""
        forms = [self.section(cls, where), {"type": "null"}, {"type": "boolean"}]
        return {"anyOf": [*_flat(forms), {"type": "string", "pattern": BOOLEAN}], "description": description}

    @staticmethod
    def short(cls: type[Section], properties: dict[str, Any]) -> list[dict[str, Any]]:
        """What may stand for a section instead of a mapping: its main value, or the names of its members."""
        if cls.scalar is not None:
            main = {
                key: value for key, value in properties[cls.scalar].items() if key not in ("default", "description")
            }
            return main["anyOf"] if set(main) == {"anyOf"} else [main]
        if cls.named:
            return [{"enum": list(cls.named)}]
        names = cls.members.names() if cls.members else []
        if not names or cls.model_fields:
            return []
        name = {"enum": names}
        either = {"anyOf": [name, {"type": "object", "properties": properties, "additionalProperties": False}]}
        return [name, {"type": "array", "items": either}]

    def field(self, cls: type[Section], name: str, where: str) -> dict[str, Any]:
        field, path = cls.model_fields[name], where + name
        kind = field.annotation
        if path in PARTS:
            part = PARTS[path]
            said = {"description": field.description or about(Config, name)}
            default = default_of(field) or {}
            return {**said, **({} if part.by == "task" else self.chosen(part, path, default.get("name")))}
        if isinstance(kind, type) and issubclass(kind, Section):
            empty = not where and name not in NEEDED
            return {**self.section(kind, f"{path}.", empty), "description": field.description or summary(kind)}
        if (below := optional(kind)) is not None:
            return self.switched(below, f"{path}.", field.description or summary(below))
        found = schema_of(field)
        self.definitions |= found.pop("$defs", {})
        if path in NAMES:
            members = NAMES[path]
            found = {"enum": members.names(), "enumDescriptions": [summary(members.get(n)) for n in members.names()]}
        found["description"] = field.description
        if not field.is_required():
            found["default"] = default_of(field)
        return found

    def chosen(self, part: Part, path: str, default: str | None) -> dict[str, Any]:
        """A section that holds the name of its class; ``default``: what it is where none is given."""
        cls = next(iter(part.variants().values()))
        names = {"enum": part.members.names()}
        mapping = {
            "type": ["object", "null"] if "." not in path else "object",
            "properties": {"name": names},
            "allOf": list(self.rules(part, path, default)),
        }
        return {"anyOf": [names, mapping]} if cls.scalar == "name" else mapping

    def rules(self, part: Part, path: str, default: str | None = None) -> list[dict[str, Any]]:
        """If the name is this, then the section is that."""
        found = []
        for name, cls in part.variants().items():
            chooser = part.by.rpartition(".")[2]
            asked: dict[str, Any] = {"properties": {chooser: {"const": name}}}
            if name != default:
                asked["required"] = [chooser]
            section = self.section(cls, f"{path}.", empty="." not in path)
            if part.by != "task" and "anyOf" in section:  # the mapping alone: short forms name no other class
                section = section["anyOf"][0]
            found.append({"if": asked, "then": {"properties": {path: section}} if part.by == "task" else section})
        return found


def _flat(schemas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part for schema in schemas for part in (schema["anyOf"] if set(schema) == {"anyOf"} else [schema])]
