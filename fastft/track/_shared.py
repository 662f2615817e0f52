"""What trackers share: their folder in the run's, the id under which a resumed run goes on, what is sent of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.files import replacing
from fastft.track.base import Record

FOLDER = "trackers"


def remembered(run_dir: Path, tracker: str) -> dict[str, str]:
    """What a tracker kept of a run when it began; empty: nothing."""
    try:
        return json.loads((run_dir / FOLDER / "ids.json").read_text(encoding="utf-8")).get(tracker, {})
    except FileNotFoundError:
        return {}


def remember(run_dir: Path, tracker: str, **values: str) -> None:
    """Keep a few texts with the run, for ``remembered``."""
    file = run_dir / FOLDER / "ids.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    every = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    with replacing(file) as scratch:
        scratch.write_text(json.dumps({**every, tracker: values}, indent=1), encoding="utf-8")


def settings(config: Config) -> dict[str, Any]:
    """The settings that differ from the defaults, by dotted keys; lists as JSON text."""
    found: dict[str, Any] = {}

    def flatten(value: Any, key: str) -> None:
        if isinstance(value, dict):
            for name, part in value.items():
                flatten(part, f"{key}.{name}" if key else name)
        else:
            found[key] = json.dumps(value) if isinstance(value, list) else value

    flatten(config.model_dump(mode="json", exclude_defaults=True), "")
    return found


def points(record: Record) -> dict[str, float]:
    """The finite numbers of a record that are curves: train/loss, ..., and eval/SET/METRIC."""
    if record.kind == "train":
        return {f"train/{name}": value for name, value in record.numbers().items()}
    if record.kind == "eval":
        return {f"eval/{record.fields['set']}/{name}": value for name, value in record.numbers().items()}
    return {}
