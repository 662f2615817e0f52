"""`fastft eval`: the metrics of a model on the configuration's evaluation sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastft import assemble
from fastft.assemble import Job
from fastft.config import Config
from fastft.errors import UserError
from fastft.files import digest
from fastft.ranks import keep_heap
from fastft.tasks.base import Metrics
from fastft.train import health
from fastft.train.errors import judged_rows, with_texts
from fastft.train.evaluation import intervals_of, measure
from fastft.zero import engine as zero

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

    Several ranks share the rows, all together, and all get the same.

    Parameters
    ----------
    rows : bool
        Also what each row was judged by.
    keep : sequence of str
        Columns of the data that are copied into ``rows``.

    Raises
    ------
    UserError
        No evaluation set; a model that was never trained for this task; rows of a task that keeps nothing of them; a
        column that is not there.
    """
    job = assemble.start(config)
    if not config.data.eval:
        raise UserError("data.eval: no evaluation data given.", "For example: data.eval=test.csv")
    job.learned = job.task.learned_of_model()
    assemble.add_data(job, train=False)
    if not job.ranks.alone:
        zero.start_process_group()
        health.check_agreement(config, digest([split.data.key for split in job.evals.values()]), job.ranks)
    engine = assemble.add_together(job)
    with ExitStack() as cleanup:
        if engine is not None:
            cleanup.callback(zero.release, engine)
        assemble.add_objective(job, engine)
        keep_heap(job.ranks.device, job.sharded)
        found = {}
        for name, split in job.evals.items():
            metrics, ids = measure(job, split, engine)
            states = job.ranks.gather(metrics.state())
            numbers, classes = metrics.finish(states), metrics.by_class(states, job.learned)
            sure = intervals_of(job, metrics, states, config.evaluation.bootstrap or RESAMPLES)
            judged = list(_rows(job, name, metrics, ids, keep)) if rows else None
            found[name] = Evaluation(numbers, classes, judged, sure)
    return found


def _rows(job: Job, name: str, metrics: Metrics, ids: np.ndarray, keep: Sequence[str]) -> Iterator[dict[str, Any]]:
    every = job.ranks.gather(judged_rows(job, name, metrics, ids))
    if all(judged is None for judged in every):
        raise UserError(
            f"The task {job.config.task} judges no single rows.", "Leave --out away; its metrics are of whole sets."
        )
    return with_texts(job, name, [row for judged in every for row in judged or []], keep)
