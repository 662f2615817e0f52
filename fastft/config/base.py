"""What a section of the configuration is: strict, with short forms, aliases of older names, and members found in a
folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo

from fastft.registry import Registry

if TYPE_CHECKING:
    from fastft.config.sections import Config

S = TypeVar("S", bound="Section")
PathKind = Literal["read", "written"]
InputPath = Annotated[str, "read"]  # paths stay strings: they may be hub ids, and they go back into YAML
OutputPath = Annotated[str, "written"]


class Section(BaseModel):
    """One mapping of the YAML file. Unknown keys are errors.

    Class attributes
    ----------------
    aliases : dict of str
        Older name of a key -> its name today. The older one keeps working in files, with a warning.
    scalar : str or None
        The key that a bare value stands for: ``layer_decay: 0.9`` is ``layer_decay: {rate: 0.9}``.
    named : dict of str
        Words that stand for the section: ``duplicates: keep`` is ``duplicates: {exact: false}``.
    members : Registry or None
        Every name of this table is an optional key of the section, whose value the named class's ``Settings``
        validates; null and false leave it out.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)
    aliases: ClassVar[dict[str, str]] = {}
    scalar: ClassVar[str | None] = None
    named: ClassVar[dict[str, dict[str, Any]]] = {}
    members: ClassVar[Registry | None] = None

    def settle(self, config: Config) -> None:
        """Give a key whose default hangs on other sections its value."""

    def check(self, config: Config) -> None:
        """Rules across sections, once all of them are there. Raises ValueError."""

    def implied(self) -> dict[str, Any]:
        """Keys of other sections (``checkpoint.best_by``) that follow from this one: set where they are null, and a
        mistake where they say something else."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, raw: Any) -> Any:
        if cls.members is not None:
            raw = short_list(cls, raw)
        if isinstance(raw, dict):
            switch: Any = {True: {}, False: None}
            raw = {
                key: switch[value] if isinstance(value, bool) and cls.switched(key) else value
                for key, value in raw.items()
            }
        if cls.named and isinstance(raw, str):
            if raw not in cls.named:
                raise ValueError(f"is none of {', '.join(cls.named)}, nor a mapping")
            return cls.named[raw]
        if cls.scalar is not None and not isinstance(raw, dict | BaseModel) and raw is not None:
            return {cls.scalar: raw}
        return raw

    @field_validator("*", mode="before")
    @classmethod
    def _no_number_is_a_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """`yes` for a number is a mistake, not 1."""
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind is not bool and not _holds_section(kind):
            text = str(value).lower()
            raise ValueError(f"{text} is no value for it (on, off, yes, no, true and false are booleans in YAML)")
        return value

    @classmethod
    def switched(cls, key: str) -> bool:
        """Whether true and false turn it on, by its defaults, and off."""
        if cls.members is not None and key in cls.members:
            return True
        return key in cls.model_fields and optional(cls.model_fields[key].annotation) is not None

    def chosen(self) -> dict[str, Section]:
        """Settings of the members that this section names, in the order of their names."""
        names = self.members.names() if self.members else []
        found = {name: getattr(self, name, None) for name in names if name in type(self).model_fields}
        return {name: settings for name, settings in found.items() if settings is not None}

    def changed(self, **values: Any) -> Self:
        """A copy with other values."""
        return self.model_copy(update=values)

    def paths(self, where: str = "") -> Iterator[tuple[str, str, PathKind]]:
        """Key, path and kind of every path here and below."""

        def found(value: Any, key: str, kind: PathKind | None) -> Iterator[tuple[str, str, PathKind]]:
            if isinstance(value, Section):
                yield from value.paths(f"{key}.")
            elif isinstance(value, list):
                for i, item in enumerate(value):
                    yield from found(item, f"{key}[{i}]", kind)
            elif isinstance(value, dict):
                for name, item in value.items():
                    yield from found(item, f"{key}.{name}", None)
            elif kind and isinstance(value, str):
                yield key, value, kind

        for name, field in type(self).model_fields.items():
            yield from found(getattr(self, name), where + name, _path_kind(field))

    def with_paths(self, change: Callable[[str, PathKind], str]) -> Self:
        """A copy with ``change(path, kind)`` for every path here and below."""

        def changed(value: Any, kind: PathKind | None) -> Any:
            if isinstance(value, Section):
                return value.with_paths(change)
            if isinstance(value, list):
                return [changed(v, kind) for v in value]
            if isinstance(value, dict):
                return {k: changed(v, None) for k, v in value.items()}
            return change(value, kind) if kind and isinstance(value, str) else value

        fields = type(self).model_fields
        return self.changed(**{name: changed(getattr(self, name), _path_kind(fields[name])) for name in fields})


def _path_kind(field: FieldInfo) -> PathKind | None:
    marks = [*field.metadata, *(m for k in get_args(field.annotation) for m in getattr(k, "__metadata__", ()))]
    return next((mark for mark in marks if mark in get_args(PathKind)), None)


def _holds_section(kind: Any) -> bool:
    kinds = getattr(kind, "__args__", (kind,))
    return any(isinstance(k, type) and issubclass(k, Section) for k in kinds)


def optional(kind: Any) -> type[Section] | None:
    """The section of a type that is a section or None."""
    kinds = set(get_args(kind)) - {type(None)}
    one = kinds.pop() if len(kinds) == 1 and type(None) in get_args(kind) else None
    return one if isinstance(one, type) and issubclass(one, Section) else None


_made: dict[tuple, type[Section]] = {}


def extended(base: type[S], **fields: Any) -> type[S]:
    """``base`` with more fields, or others: one class for the same fields, so that equal sections are equal."""
    key = (base, *((name, kind) for name, (kind, _) in sorted(fields.items())))
    if key not in _made:
        _made[key] = create_model(base.__name__, __base__=base, **fields)
    return _made[key]  # type: ignore[return-value]


def specialized(base: type[Section], raw: Any) -> type[Section]:
    """``base`` with a field for each member that ``raw`` names, here and in the sections below."""
    if not isinstance(raw, dict):
        return base
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        if name in base.model_fields:
            kind = base.model_fields[name].annotation
            if isinstance(kind, type) and issubclass(kind, Section):
                below = specialized(kind, short_list(kind, value))
                if below is not kind:
                    fields[name] = (
                        below,
                        Field(default_factory=below, description=base.model_fields[name].description),
                    )
        elif base.members is not None and name in base.members:
            fields[name] = member_field(base.members, name)
    return extended(base, **fields) if fields else base


def member_field(members: Registry, name: str) -> tuple[Any, Any]:
    """Type and default of the key that a member is in its section."""
    entry = members.get(name)
    text = (entry.__doc__ or "").strip().split("\n\n")[0].replace("\n", " ")
    return (entry.Settings | None, Field(None, description=text))


def short_list(kind: type[Section], value: Any) -> Any:
    """``trackers: tensorboard`` and ``trackers: [tensorboard, {wandb: {project: x}}]`` as the mapping that they stand
    for.
    """
    if kind.members is None or kind.scalar is not None:
        return value
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value
    mapping: dict[str, Any] = {}
    for item in value:
        mapping.update(item if isinstance(item, dict) else {str(item): {}})
    return mapping
