"""`fastft eval`: the metrics of a model on the configuration's evaluation sets, in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastft import assemble
from fastft.assemble import Job
from fastft.config import Config
from fastft.data import formats
from fastft.data.formats.base import MISSING, value_of
from fastft.errors import UserError, did_you_mean
from fastft.evaluate.predict import kept_beside, rounded
from fastft.tasks.base import Metrics
from fastft.train.evaluation import measure


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
    """

    metrics: dict[str, float]
    classes: dict[str, dict[str, float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] | None = None


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
        numbers, classes = metrics.finish([metrics.state()]), metrics.by_class(job.learned)
        judged = list(_rows(job, name, metrics, ids, keep)) if rows else None
        found[name] = Evaluation(numbers, classes, judged)
    return found


def _rows(job: Job, name: str, metrics: Metrics, ids: np.ndarray, keep: Sequence[str]) -> Iterator[dict[str, Any]]:
    judged = metrics.judged(job.learned)
    if judged is None:
        raise UserError(
            f"The task {job.config.task} judges no single rows.", "Leave --out away; its metrics are of whole sets."
        )
    data = job.evals[name].data
    by_place = {data.origin(int(ids[place])): rounded(record) for place, record in judged}
    texts = {field: column for field, column in _fields(job).items() if column is not None}
    for source in job.config.data.eval[name]:
        for where, record in formats.read(source):
            if where not in by_place:
                continue  # it was empty or too long: the evaluation's counts have it
            if missing := [column for column in keep if column not in record]:
                raise UserError(f"{where}: no column {missing[0]!r}.", did_you_mean(missing[0], record))
            own = {field: _shown(record, column) for field, column in texts.items()}
            row = {"set": name, "row": where, **own, **by_place.pop(where)}
            yield kept_beside({column: record[column] for column in keep}, row)
    yield from ({"set": name, "row": where, **record} for where, record in by_place.items())  # the file has moved


def _shown(record: formats.Record, column: str) -> Any:
    value = value_of(record, column)
    return None if value is MISSING else value


def _fields(job: Job) -> dict[str, str | None]:
    return job.task.predictor(job.model, job.learned, type(job.task).Predict()).fields
