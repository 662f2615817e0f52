"""Rows of evaluation sets beside what a model made of them; the worst of each set in a file of the run."""

from __future__ import annotations

import heapq
import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastft.assemble import Job
from fastft.data import formats
from fastft.data.formats.base import MISSING, Record, value_of
from fastft.errors import UserError, did_you_mean
from fastft.files import replacing
from fastft.inference.base import kept_beside, rounded
from fastft.tasks.base import Metrics

log = logging.getLogger(__name__)

Judged = list[tuple[str, dict[str, Any]]]  # file and line of a row, and what is known of it


def judged_rows(job: Job, name: str, metrics: Metrics, ids: np.ndarray) -> Judged | None:
    """Of one rank's samples, in the order of ``ids``; None: the task judges no single rows."""
    found, data = metrics.judged(job.learned) if len(ids) else [], job.evals[name].data
    if found is None:
        return None
    return [(record.pop("row", None) or data.origin(int(ids[place])), record) for place, record in found]


def with_texts(job: Job, name: str, judged: Judged, keep: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Records with ``set``, ``row`` (file and line) and the row's texts, in the order of the files.

    ``keep``: columns of the data that are copied. Raises UserError for one that is not there.
    """
    left: dict[str, list[dict[str, Any]]] = {}
    for where, record in judged:
        left.setdefault(where, []).append(rounded(record))
    fields = job.task.predictor(job.model, job.learned, type(job.task).Predict()).fields
    texts = {field: column for field, column in fields.items() if column is not None}
    for source in job.config.data.eval[name]:
        for where, row in formats.read(source):
            if where not in left:
                continue  # it was empty or too long (the evaluation's counts have it), or is not asked for
            if missing := [column for column in keep if column not in row]:
                raise UserError(f"{where}: no column {missing[0]!r}.", did_you_mean(missing[0], row))
            own = {"set": name, "row": where, **{field: _shown(row, column) for field, column in texts.items()}}
            for record in left.pop(where):
                yield kept_beside({column: row[column] for column in keep}, {**own, **record})
            if not left:
                return
    for where, records in left.items():  # the file has moved
        yield from ({"set": name, "row": where, **record} for record in records)


def write_worst(job: Job, name: str, metrics: Metrics, ids: np.ndarray, step: int) -> None:
    """``<run.dir>/errors/NAME.jsonl``: the rows of the set with the largest errors of all ranks, the worst first.

    All ranks take part. Nothing is written where the task cannot say how wrong a row is.
    """
    number = job.config.evaluation.worst
    if not number:
        return
    rows = judged_rows(job, name, metrics, ids) or []
    sized = [(error, row) for row in rows if (error := metrics.error_of(row[1])) is not None and not math.isnan(error)]
    own = heapq.nlargest(number, sized, key=lambda pair: pair[0])
    every = [pair for part in job.ranks.gather_data(own) for pair in part]
    if not every or not job.ranks.main:
        return
    worst = [row for _, row in heapq.nlargest(number, every, key=lambda pair: pair[0])]
    try:
        lines = list(with_texts(job, name, worst))
    except UserError as e:  # training needs the files no more once they are prepared
        log.warning("%s the worst rows are kept without their texts", e.message)
        lines = [{"set": name, "row": where, **rounded(record)} for where, record in worst]
    lines.sort(key=lambda line: metrics.error_of(line) or 0.0, reverse=True)
    path = Path(job.config.run.dir) / "errors" / f"{name}.jsonl"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as scratch:
            written = (json.dumps({"step": step, **line}, ensure_ascii=False) for line in lines)
            scratch.write_text("".join(f"{line}\n" for line in written), encoding="utf-8")
    except OSError as e:
        log.warning("%s: not written: %s", path, e)


def _shown(record: Record, column: str) -> Any:
    value = value_of(record, column)
    return None if value is MISSING else value
