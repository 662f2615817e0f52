"""From a YAML file and dotted overrides to a checked configuration, and back."""

import logging
import os
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, ValidationError, create_model

from fastft import rooms
from fastft.config.base import PathKind, Section, extended, member_field, short_list, specialized
from fastft.config.sections import Config, Data, Loss, Optim, Run, Trackers
from fastft.errors import UserError, did_you_mean

log = logging.getLogger(__name__)
S = TypeVar("S", bound=Section)

# PyYAML lets through what int(), datetime() and Python's stack say of a value; UnicodeDecodeError is a ValueError.
BROKEN_YAML = (yaml.YAMLError, ValueError, RecursionError)

# What fastft 0.1.0 stored in every run's config.yaml, whatever the task and the optimizer were.
STORED_BY_0_1 = {
    "data": {"packing", "text", "text_pair", "label", "multi_label", "label_separator", "labels"},
    "optim": {"betas", "eps", "state_dtype", "master"},
    "loss": {"implementation", "label_smoothing", "z_loss"},
}


def load(path: str | Path, overrides: Sequence[str] = (), *, stored: bool = False) -> Config:
    """Read a YAML file, apply dotted overrides (``optim.lr=1e-4``), validate.

    Parameters
    ----------
    stored : bool
        Whether the file is what a run keeps in its folder: keys of other tasks that older versions wrote are passed
        over.

    Raises
    ------
    UserError
        Names the file and the key, with a did-you-mean for unknown keys.
    """
    raw = read(path, overrides)
    if stored:
        raw = _without_stored_defaults(raw)
    return validate(raw, str(path))


def read(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """The mapping in a YAML file with its overrides, not validated. Raises UserError."""
    path = Path(path)
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such configuration file.", near)
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except BROKEN_YAML as e:
        raise UserError(f"{path}: not valid YAML: {e}") from None
    if not isinstance(raw, dict):
        raise UserError(
            f"{path}: expected a mapping of sections, got {type(raw).__name__}.", "See configs/ for examples."
        )
    for override in overrides:
        _apply_override(raw, override)
    return raw


def load_run(folder: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run in a folder, wherever the folder was moved to. UserError when it holds no run."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder}: not a run folder (no config.yaml).", "Give the run.dir of a run that `fastft train` began."
        )
    config = load(folder / "config.yaml", overrides, stored=True)
    return config.changed(run=config.run.changed(dir=str(folder)))


def run_dir(path: str | Path, overrides: Sequence[str] = ()) -> Path:
    """``run.dir`` of a configuration, nothing else of which is looked at: a launcher needs no task."""
    run = read(path, overrides).get("run") or {}
    where = run.get("dir", "runs/default") if isinstance(run, dict) else None
    if not isinstance(where, str):
        raise UserError(f"{path}: run.dir: {where!r} is no path.")
    return Path(expanded(Run(dir=where), str(path)).dir)


def validate(raw: dict, where: str = "config") -> Config:
    """Validate a plain mapping. UserError lists every mistake, one line each."""
    problems: list[str] = []
    cls = config_class(raw, problems)
    raw = _renamed(cls, raw)
    return expanded(_validated(cls, raw, where, problems), where)


def expanded(found: S, where: str) -> S:
    """The same with ~ and $VARIABLES in every path replaced, as a shell does it. UserError for what means nothing."""
    keys = {path: key for key, path, _ in found.paths()}

    def whole(path: str, kind: PathKind) -> str:
        new = os.path.expandvars(os.path.expanduser(path))
        if path.startswith("~") and new.startswith("~"):
            raise UserError(f"{where}: {keys[path]}: {path}: no such user's home.", "Write the path in full.")
        if unset := re.search(r"\$(\w+|\{\w+\})", new):
            raise UserError(
                f"{where}: {keys[path]}: {path}: the environment variable {unset[1].strip('{}')} is not set.",
                "Set it, or write the path in full.",
            )
        return new

    return found.with_paths(whole) if any("$" in path or path.startswith("~") for path in keys) else found


def section(kind: type[S], raw: dict, where: str) -> S:
    """One section of a configuration from a plain mapping; errors as in ``validate``."""
    return _validated(kind, raw, where, [])


def _validated(cls: type[S], raw: dict, where: str, problems: list[str]) -> S:
    try:
        found = cls.model_validate(raw)
    except ValidationError as e:
        problems += [_explain(error, cls) for error in e.errors()]
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise UserError(
            f"{where}: {len(problems)} mistake{'s' * (len(problems) > 1)}:\n{lines}",
            "`fastft config schema` lists every key with its meaning.",
        )
    return found


def config_class(raw: dict, problems: list[str] | None = None) -> type[Config]:
    """``Config`` with the sections of the task, optimizer, order and members that ``raw`` names.

    Names that are not known are appended to ``problems``, and the sections concerned stay as they are.
    """
    problems = [] if problems is None else problems
    fields: dict[str, Any] = {}
    sections = {name: value for name, value in raw.items() if isinstance(value, dict)}
    task = _named(rooms.TASKS, raw.get("task"), "task", problems)
    data: type[Section] = task.Data if task else _Lenient
    order = sections.get("data", {}).get("order", "permutation")
    order_name = order.get("name", "permutation") if isinstance(order, dict) else order
    if chosen := _named(rooms.ORDERS, order_name, "data.order.name", problems):
        data = extended(data, order=(chosen.Settings, Field(default_factory=chosen.Settings)))
    name = sections.get("optim", {}).get("name", "fused_adamw")
    optimizer = _named(rooms.OPTIMIZERS, name, "optim.name", problems)
    bases: dict[str, type[Section]] = {
        "data": data,
        "loss": task.Loss if task else _LenientLoss,
        "optim": optimizer.Settings if optimizer else _LenientOptim,
    }
    for key, base in bases.items():
        kind = specialized(base, sections.get(key, {}))
        fields[key] = (kind, Field(default_factory=kind))
    cls = extended(Config, **fields)
    return specialized(cls, raw)  # type: ignore[return-value]


class _Lenient(Data, extra="allow"):
    """Used where the task is not known: its keys cannot be judged."""


class _LenientLoss(Loss, extra="allow"):
    pass


class _LenientOptim(Optim, extra="allow"):
    pass


def _named(registry, name: Any, key: str, problems: list[str]):
    """The member that a key names; None, with the problem noted, when there is none."""
    if name is None:
        return None  # required but absent: pydantic says so
    try:
        if not isinstance(name, str):
            raise UserError(f"Unknown {registry.kind} {name!r}.", did_you_mean(str(name), registry.names()))
        return registry.get(name)
    except UserError as e:
        problems.append(f"{key}: {e.message[0].lower()}{e.message[1:]} {e.hint}".strip())
        return None


@lru_cache
def full_class() -> type[Config]:
    """``Config`` with everything that there is, for the schema."""

    def every(base: type[Section]) -> type[Section]:
        names = base.members.names() if base.members else []
        fields = {name: member_field(base.members, name) for name in names if base.members}
        return extended(base, **fields) if fields else base

    tasks = [rooms.TASKS.get(name) for name in rooms.TASKS.names()]
    optimizers = [rooms.OPTIMIZERS.get(name) for name in rooms.OPTIMIZERS.names()]
    either = Union.__getitem__  # of as many as there are
    fields: dict[str, Any] = {
        "data": (either(tuple(task.Data for task in tasks)), Data()),
        "loss": (either(tuple(every(task.Loss) for task in tasks)), Loss()),
        "optim": (either(tuple(every(optimizer.Settings) for optimizer in optimizers)), Optim()),
    }
    for key in ("model", "train", "run"):
        field = Config.model_fields[key]
        kind = every(field.annotation)  # type: ignore[arg-type]
        fields[key] = (kind, field.default if not field.is_required() else ...)
    return create_model("Config", __base__=Config, **fields)


def dump(config: Config) -> str:
    """The whole configuration, defaults included, as YAML that ``load`` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def absolute(config: Config) -> Config:
    """The configuration with every local path in full, so that it means the same from any working directory."""

    def whole(path: str, kind: PathKind) -> str:
        return str(Path(path).absolute()) if kind == "written" or Path(path).exists() else path  # a hub id does not

    return config.with_paths(whole)


def inputs(config: Config) -> dict[str, Path]:
    """Every local file and folder that a run reads, by its key.

    model.path and model.tokenizer are hub ids unless they are there or can only be a path.
    """
    found = {}
    for key, path, kind in config.paths():
        hub_id = key in ("model.path", "model.tokenizer") and not path.startswith(("/", ".", "~"))
        if kind == "read" and (Path(path).exists() or not hub_id):
            found[key if key == "model.path" else key.removesuffix(".path")] = Path(path)
    return found


def _renamed(cls: type[Section], raw: dict, where: str = "", quiet: bool = False) -> dict:
    """Keys under their names of today, with a warning for each older one."""
    out: dict = {}
    for key, value in raw.items():
        new = cls.aliases.get(key, key)
        if new != key:
            if new in raw:
                raise UserError(f"{where}{key} is an older name of {where}{new}.", "Give one of the two.")
            if not quiet:
                log.warning("%s%s is now called %s%s; the older name still works", where, key, where, new)
        field = cls.model_fields.get(new)
        kind = field.annotation if field else None
        if isinstance(kind, type) and issubclass(kind, Section) and isinstance(value, dict):
            value = _renamed(kind, value, f"{where}{key}.", quiet)
        out[new] = value
    return out


def _without_stored_defaults(raw: dict) -> dict:
    cls = config_class(raw)
    raw = _renamed(cls, raw, quiet=True)
    for name, keys in STORED_BY_0_1.items():
        kind: Any = cls.model_fields[name].annotation
        if isinstance(raw.get(name), dict):
            raw[name] = {k: v for k, v in raw[name].items() if k not in keys or k in kind.model_fields}
    return raw


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


def _apply_override(raw: dict, override: str) -> None:
    key, eq, text = override.partition("=")
    if not eq or not key:
        raise UserError(f"Override {override!r} is not of the form section.key=value.", "For example: optim.lr=2e-5")
    try:
        value = yaml.load(text, Loader=_UniqueKeyLoader)
    except BROKEN_YAML as e:
        raise UserError(f"Override {override!r}: the value is not valid YAML: {e}") from None
    set_value(raw, key, value, f"Override {override!r}")


def set_value(raw: dict, key: str, value: Any, where: str) -> None:
    """Set a dotted key of a plain mapping, its sections made as needed. UserError, which begins with ``where``, when
    one of them is no section.
    """
    *parents, last = key.split(".")
    node = raw
    for name in parents:
        child = node.setdefault(name, {})
        if name == "trackers" and isinstance(child, (str, list)):
            child = node[name] = short_list(Trackers, child)
        if child is None or child is True:
            child = node[name] = {}
        if not isinstance(child, dict):
            shown = child if isinstance(child, (str, int, float)) else f"a {type(child).__name__}"
            raise UserError(
                f"{where}: {name!r} is {shown} in the file, not a section.",
                f"Write it there as a mapping: {name}: {{{last}: ...}}",
            )
        node = child
    if parents == ["data"]:  # an override by an older name beside the file's newer one, or the other way round
        for names in Data.aliases.items():
            if last in names:
                node.pop(names[0], None)
                node.pop(names[1], None)
    node[last] = value


def _explain(error: Any, cls: type[Section]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key. {did_you_mean(str(error['loc'][-1]), _keys_at(error['loc'][:-1], cls))}"
    if error["type"] == "missing":
        return f"{key}: required, but not there."
    message = error["msg"].removeprefix("Value error, ")
    shown = repr(error.get("input"))
    if error["type"] == "value_error" or len(shown) > 80:
        return f"{key}: {message}" if key else message
    return f"{key}: {message} (got {shown})"


def _keys_at(loc: tuple, cls: type[Section]) -> list[str]:
    """Field names of the section that a validation error's location leads to, with those that its members would add."""
    model: Any = cls
    for part in loc:
        if isinstance(part, str) and _is_section(model) and part in model.model_fields:
            model = model.model_fields[part].annotation
        while get_origin(model) is not None:  # list[Source], dict[str, list[Source]], Settings | None
            model = next((a for a in get_args(model) if _is_section(a)), get_args(model)[-1])
    if not _is_section(model):
        return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []
    return [*model.model_fields, *(model.members.names() if model.members else [])]


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)
