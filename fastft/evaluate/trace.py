"""`fastft trace`: which documents a training step learns from; the order is a function of the configuration, so nothing needs to have run."""

from pathlib import Path

from fastft import config as configuration
from fastft.errors import UserError
from fastft.models import load
from fastft.tasks import TASKS
from fastft.train.loop import Schedule


def trace(path: Path, overrides: list[str], step: int) -> list[dict]:
    """The samples of step ``step`` (counted from 1, as in the log), in order: ``sample`` (id) and ``documents`` (file and line of each).

    Parameters
    ----------
    path : Path
        A run folder, or a configuration file.
    """
    config = configuration.load(path / "config.yaml" if path.is_dir() else path, overrides)
    if config.run.offline:
        load.go_offline()
    task = TASKS.get(config.task)(config)
    split = task.train_split()
    schedule = Schedule.of(config, len(split), task.max_length)
    if not 1 <= step <= schedule.total:
        raise UserError(f"--step {step}: the run has steps 1 to {schedule.total}.")
    ids = schedule.ids(step - 1, len(split), config.data.seed)
    return [{"sample": int(i), "documents": task.documents(split, int(i))} for i in ids]
