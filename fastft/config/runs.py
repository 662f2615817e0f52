"""Configurations from Python, and those of runs: of an exported model, and what changed since a checkpoint."""

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastft.config.loading import load_either, validate
from fastft.config.reading import read, set_value
from fastft.config.sections import Config
from fastft.errors import UserError


def configured(config: str | os.PathLike | Mapping[str, Any] | Config, overrides: Mapping[str, Any]) -> Config:
    """A checked configuration from a file's path, a mapping as a file has it, or one that is checked already.

    Parameters
    ----------
    overrides : mapping
        Values by dotted key, ``{"optim.lr": 1e-4}``, or by section, ``{"optim": {"lr": 1e-4}}``, whose other keys stay.

    Raises
    ------
    UserError
        As ``load`` does.
    """
    if isinstance(config, Config):
        raw, where = config.model_dump(mode="json"), "config"
    elif isinstance(config, Mapping):
        raw, where = copy.deepcopy(dict(config)), "config"
    elif isinstance(config, (str, os.PathLike)):
        raw, where = read(Path(config)), str(config)
    else:
        raise UserError(
            f"config: {type(config).__name__} is no configuration.", "Give a file's path, a mapping or a Config."
        )
    for key, value in overrides.items():
        for dotted, single in _single(key, value).items():
            set_value(raw, dotted, single, f"Override {dotted!r}")
    return validate(raw, where)


def _single(key: str, value: Any) -> dict[str, Any]:
    """A section's values one by one; data.eval's keys are names of the user's, so that it is a value itself."""
    if not isinstance(value, Mapping) or key == "data.eval" or not value:
        return {key: value.as_posix() if isinstance(value, Path) else value}
    return {k: v for name, part in value.items() for k, v in _single(f"{key}.{name}", part).items()}


def of_trained(target: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration to evaluate with: of a YAML file; of a run's folder, that of its exported model."""
    config, is_run = load_either(target, overrides)
    if not is_run or any(o.startswith("model.path=") for o in overrides):
        return config
    if not (Path(target) / "model").is_dir():
        raise UserError(
            f"{target}: holds no exported model: the run has not come to its end.",
            f"fastft resume {target} goes on; fastft export {target} FOLDER makes a model of its newest checkpoint.",
        )
    model = config.model.changed(path=str(Path(target) / "model"), init="pretrained", tokenizer=None)
    return config.changed(model=model)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two dumped configurations, a sentence each: ``optim.lr 0.0001 -> 5e-05``.

    A path that is written in full in one of them only is no difference, and neither is where the run's folder is.
    """
    then, later = flat(before), flat(now)
    changed = [key for key in later if key != "run.dir" and not _same(then.get(key), later[key])]
    gone = [key for key in then if key not in later and then[key] is not None]
    shown = [(key, then.get(key), later.get(key)) for key in (*changed, *gone)]
    return [f"{key} {_shown(old)} -> {_shown(new)}" for key, old, new in shown]


def flat(value: Any, key: str = "") -> dict[str, Any]:
    """Values by dotted key; lists' members by number."""
    if isinstance(value, Mapping) and value:
        pairs = [(f"{key}.{name}" if key else str(name), part) for name, part in value.items()]
    elif isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value):
        pairs = [(f"{key}[{i}]", part) for i, part in enumerate(value)]
    else:
        return {key: value}
    return {k: v for name, part in pairs for k, v in flat(part, name).items()}


def _same(one: Any, other: Any) -> bool:
    if one == other or {repr(one), repr(other)} <= {"None", "{}", "[]"}:
        return True
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    whole, part = sorted((os.path.normpath(one), os.path.normpath(other)), key=os.path.isabs, reverse=True)
    return os.path.isabs(whole) and not os.path.isabs(part) and whole.endswith(f"{os.sep}{part}")


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
