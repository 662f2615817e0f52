"""`fastft eval`: the metrics of a model on the configuration's evaluation sets, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastft import assemble
from fastft.assemble import Job
from fastft.config import Config
from fastft.errors import UserError
from fastft.tasks.base import Metrics
from fastft.train.errors import judged_rows, with_texts
from fastft.train.evaluation import intervals_of, measure

RESAMPLES = 1000  # of the intervals, where evaluation.bootstrap does not say how many


@dataclass(frozen=True)
class Evaluation:
    """What a model reaches on one evaluation set.

    Attributes
    ----------
    metrics : dict
        The task's metrics by name: loss, accuracy, ...
    classes : dict
        ``precision``, ``recall``, ``f1`` and ``support`` by label or entity type; empty where the task has none.
    rows : list of dict or None
        Where they were asked for: ``set``, ``row`` (file and line), the row's texts, and what the task judged it by
        (``gold``, ``label``, ``score``, ...), in the order of the files.
    intervals : dict
        Lower and upper end of a 95 % interval by metric, by the bootstrap over the rows; of those that are means or the
        like of single rows.
    """

    metrics: dict[str, float]
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] | None = None
    intervals: dict[str, list[float]] = field(default_factory=dict)


def evaluate_model(config: Config, *, rows: bool = False, keep: Sequence[str] = ()) -> dict[str, Evaluation]:
    """Evaluations by set name, of the model in ``config.model.path``.

    Parameters
    ----------
    rows : bool
        Also what each row was judged by.
    keep : sequence of str
        Columns of the data that are copied into ``rows``.

    Raises
    ------
    UserError
        No evaluation set; a model that was never trained for this task; more than one rank; rows of a task that keeps
        nothing of them; a column that is not there.
    """
    job = assemble.start(config)
    if not job.ranks.alone:
        raise UserError("fastft eval runs in one process.", "Start it without a launcher.")
    if not config.data.eval:
        raise UserError("data.eval: no evaluation data given.", "For example: data.eval=test.csv")
    job.learned = job.task.learned_of_model()
    assemble.add_data(job, train=False)
    assemble.add_model(job, "trained")
    assemble.add_objective(job)
    found = {}
    for name, split in job.evals.items():
        metrics, ids = measure(job, split)
        states = [metrics.state()]
        numbers, classes = metrics.finish(states), metrics.by_class(job.learned)
        sure = intervals_of(job, metrics, states, config.evaluation.bootstrap or RESAMPLES)
        judged = list(_rows(job, name, metrics, ids, keep)) if rows else None
        found[name] = Evaluation(numbers, classes, judged, sure)
    return found


def _rows(job: Job, name: str, metrics: Metrics, ids: np.ndarray, keep: Sequence[str]) -> Iterator[dict[str, Any]]:
    judged = judged_rows(job, name, metrics, ids)
    if judged is None:
        raise UserError(
            f"The task {job.config.task} judges no single rows.", "Leave --out away; its metrics are of whole sets."
        )
    return with_texts(job, name, judged, keep)
