"""`fastft trace`: which documents a training step learns from; the order is a function of the configuration, so
nothing needs to have run.
"""

from __future__ import annotations

from pathlib import Path

from fastft import assemble, track
from fastft import config as configuration
from fastft.assemble import Job
from fastft.config import Config
from fastft.data.mixture import Mixture
from fastft.data.orders.base import Samples
from fastft.errors import UserError
from fastft.train import run_folder
from fastft.train.schedule import Schedule


def trace(path: Path, overrides: list[str], step: int) -> list[dict]:
    """The samples of step ``step`` (counted from 1, as in the log), in order: ``sample`` (id), ``documents`` (file and
    line of each) and, of a mixture, ``source``.

    Parameters
    ----------
    path : Path
        A run folder, or a configuration file.

    Raises
    ------
    UserError
        A step that the run does not have; data that is not what this run has learned from.
    """
    config, is_run = configuration.load_either(path, overrides)
    job, samples = samples_of(config, step, path if is_run else None)
    assert job.train is not None
    found: list[dict] = []
    for i in samples.ids.tolist():
        source = {"source": job.order.source_of(i)} if isinstance(job.order, Mixture) else {}
        found.append({"sample": i, **source, "documents": job.task.documents(job.train, i)})
    return found


def samples_of(config: Config, step: int, run_dir: Path | None) -> tuple[Job, Samples]:
    """The job with its training data, and the samples of a step: of the run in ``run_dir`` as its last start recorded
    it, or of one that would begin.

    Raises UserError as ``trace`` does.
    """
    job = assemble.start(config)
    assemble.add_data(job, evals=False)
    assert job.train is not None and job.order is not None
    segments: list = []
    records = track.read(run_dir) if run_dir is not None and (run_dir / "metrics.jsonl").exists() else []
    if run_dir is not None and (starts := [r for r in records if r["kind"] == "run"]):
        key = job.train.data.key
        run_folder.check_data(run_dir / "metrics.jsonl", starts[-1].get("data_key", key), key)
        segments = starts[-1].get("segments", starts[-1].get("knots", []))  # as fastft 0.1.0 called them
    schedule = Schedule.of(config, job.order, job.task.max_length, segments)
    if not 1 <= step <= schedule.total:
        raise UserError(f"--step {step}: the run has steps 1 to {schedule.total}.")
    return job, schedule.samples(step - 1)
