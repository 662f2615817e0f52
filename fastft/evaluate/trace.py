"""`fastft trace`: which documents a training step learns from; the order is a function of the configuration, so nothing needs to have run."""

from pathlib import Path

import numpy as np

from fastft import config as configuration
from fastft.config import Config
from fastft.errors import UserError
from fastft.models import load
from fastft.tasks import TASKS, Split, Task
from fastft.train import run_folder, telemetry
from fastft.train.schedule import Schedule


def trace(path: Path, overrides: list[str], step: int) -> list[dict]:
    """The samples of step ``step`` (counted from 1, as in the log), in order: ``sample`` (id) and ``documents`` (file and line of each).

    Parameters
    ----------
    path : Path
        A run folder, or a configuration file.

    Raises
    ------
    UserError
        A step that the run does not have; data that is not what this run has learnt from.
    """
    config = configuration.load(path / "config.yaml" if path.is_dir() else path, overrides)
    if config.run.offline:
        load.go_offline()
    task, split, ids = samples(config, step, path if path.is_dir() else None)
    return [{"sample": int(i), "documents": task.documents(split, int(i))} for i in ids]


def samples(config: Config, step: int, run_dir: Path | None) -> tuple[Task, Split, np.ndarray]:
    """The task, its training data, and the ids of the samples of a step: of the run in ``run_dir`` as its last start recorded it, or of one that would begin.

    Raises UserError as ``trace`` does.
    """
    task = TASKS.get(config.task)(config)
    split = task.train_split()
    knots: list = []
    if (
        run_dir is not None
        and (run_dir / "metrics.jsonl").exists()
        and (starts := [r for r in telemetry.read(run_dir) if r["kind"] == "run"])
    ):
        run_folder.check_data(run_dir / "metrics.jsonl", starts[-1].get("data_key", split.data.key), split.data.key)
        knots = starts[-1].get("knots", [])
    schedule = Schedule.of(config, len(split), task.max_length, knots)
    if not 1 <= step <= schedule.total:
        raise UserError(f"--step {step}: the run has steps 1 to {schedule.total}.")
    return task, split, schedule.ids(step - 1, len(split), config.data.seed)
