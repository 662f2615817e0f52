"""From a YAML file and dotted overrides to a checked configuration, and back."""

import glob
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import Field, ValidationError

from fastft import rooms
from fastft.config.base import PathKind, Section, extended, specialized
from fastft.config.evaluation import Evaluation
from fastft.config.explaining import explained
from fastft.config.reading import read
from fastft.config.sections import Config, Data, Loss, Optim, Run
from fastft.config.sources import Source, TrainSource, called
from fastft.errors import UserError, did_you_mean

log = logging.getLogger(__name__)
S = TypeVar("S", bound=Section)
Read = TypeVar("Read", bound=Source)

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


def load_run(folder: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of the run in a folder, wherever the folder was moved to. UserError when it holds no run."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        why = "no config.yaml" if folder.is_dir() else "it is not there"
        near = [str(run) for run in (*_runs_in(folder), *_runs_in(folder.parent))]
        hint = f"Runs near it: {', '.join(near[:10])}." if near else ""
        raise UserError(
            f"{folder}: not a run folder ({why}).", hint or "Give the run.dir of a run that `fastft train` began."
        )
    config = load(folder / "config.yaml", overrides, stored=True)
    return config.changed(run=config.run.changed(dir=str(folder)))


def load_either(target: str | Path, overrides: Sequence[str] = ()) -> tuple[Config, bool]:
    """The configuration of a run folder or of a YAML file, and whether it is a run's. UserError when it is neither."""
    path = Path(target)
    if path.is_file() or (path.suffix in (".yaml", ".yml") and not path.is_dir()):
        return load(path, overrides), False
    return load_run(path, overrides), True


def _runs_in(folder: Path) -> list[Path]:
    """The runs in a folder, newest first."""
    files = [file for file in folder.glob("*/config.yaml") if (file.parent / "metrics.jsonl").is_file()]
    return [file.parent for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True)]


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
    found = expanded(_validated(cls, raw, where, problems), where)
    sets = {name: globbed(sources, f"{where}: data.eval.{name}") for name, sources in found.data.eval.items()}
    return found.changed(data=found.data.changed(train=globbed(found.data.train, f"{where}: data.train"), eval=sets))


def expanded(found: S, where: str) -> S:
    """The same with ~ and $VARIABLES in every path replaced, as a shell does it. UserError for what means nothing."""
    keys = {path: key for key, path, _ in found.paths()}

    def whole(path: str, kind: PathKind) -> str:
        if Path(path).exists():  # a $ may be part of a name
            return path
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


def globbed(sources: list[Read], where: str) -> list[Read]:
    """Each source whose path is a pattern (``data/*.jsonl``) as those of the files and folders that it matches, sorted.

    They are what a run keeps: files that come later are no part of it. In a mixture they stay one source, by its name.
    Raises UserError for a pattern without a match.
    """
    found = []
    for source in sources:
        if not glob.has_magic(source.path) or Path(source.path).exists():
            found.append(source)
            continue
        paths = sorted(glob.glob(source.path, recursive=True))
        if not paths:
            raise UserError(
                f"{where}: {source.path}: no file matches.", "In it, * is any text, ? a character, ** folders."
            )
        mixed = isinstance(source, TrainSource) and not (source.weight is None and source.epochs is None)
        same = {"name": source.name or called(source.path)} if mixed else {}
        found += [source.changed(path=path, **same) for path in paths]
    return found


def section(kind: type[S], raw: dict, where: str) -> S:
    """One section of a configuration from a plain mapping; errors as in ``validate``."""
    return _validated(kind, raw, where, [])


def _validated(cls: type[S], raw: dict, where: str, problems: list[str]) -> S:
    try:
        found = cls.model_validate(raw)
    except ValidationError as e:
        problems += explained(e, cls)
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        raise UserError(
            f"{where}: {len(problems)} mistake{'s' * (len(problems) > 1)}:\n{lines}",
            "`fastft config explain KEY` says what a key means.",
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
    default = data.model_fields["order"].default.name
    order = sections.get("data", {}).get("order", default)
    order_name = order.get("name", default) if isinstance(order, dict) else order
    if chosen := _named(rooms.ORDERS, order_name, "data.order.name", problems):
        kind = extended(chosen.Settings, name=(str, Field(order_name)))
        data = extended(data, order=(kind, Field(default_factory=kind)))
    name = sections.get("optim", {}).get("name", "fused_adamw")
    optimizer = _named(rooms.OPTIMIZERS, name, "optim.name", problems)
    bases: dict[str, type[Section]] = {
        "data": data,
        "loss": task.Loss if task else _LenientLoss,
        "evaluation": task.Evaluation if task else _LenientEvaluation,
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


class _LenientEvaluation(Evaluation, extra="allow"):
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
