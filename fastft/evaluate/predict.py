"""Predictions for rows of a file, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from fastft import assemble
from fastft import config as configuration
from fastft.data import formats
from fastft.errors import UserError
from fastft.inference.base import Predictor, Row


def predictor(path: str, options: dict) -> Predictor:
    """That of an exported model, a run folder, or a hub id.

    Parameters
    ----------
    options : dict
        Values for the task's ``Predict`` section; None: its default.

    Raises
    ------
    UserError
        No such model, or an option that the task does not have.
    """
    job = assemble.trained(path)
    given = {name: value for name, value in options.items() if value is not None}
    section = configuration.section(type(job.task).Predict, given, f"fastft predict ({job.config.task})")
    return job.task.predictor(job.model, job.learned, section)


def predict(predictor: Predictor, rows: Iterable[tuple[str, Row]], batch_size: int = 32) -> Iterator[dict]:
    """One record per row, in order.

    Parameters
    ----------
    rows : iterable of (where, row)
        A row maps the predictor's ``fields`` to values.
    """
    rows = iter(rows)
    while chunk := list(islice(rows, batch_size)):
        prepared = [predictor.prepare(where, row) for where, row in chunk]
        with torch.inference_mode():
            records = predictor.run(prepared)
        yield from records


def read(
    predictor: Predictor, source: configuration.Source, columns: dict[str, str | None]
) -> Iterator[tuple[str, Row]]:
    """Rows of a data file.

    ``columns``: instead of the predictor's own, for some of its fields. Raises UserError, naming the row.
    """
    if strange := [name for name, column in columns.items() if column is not None and name not in predictor.fields]:
        raise UserError(f"This model's task has no {strange[0]}.", f"It has: {', '.join(predictor.fields)}.")
    wanted = {**predictor.fields, **{name: column for name, column in columns.items() if column is not None}}
    for where, record in formats.read(source):
        row = {}
        for name, column in wanted.items():
            if column is None:
                continue
            if record.get(column) is None:
                raise UserError(
                    f"{where}: no {name} in column {column!r}.",
                    f"Columns: {', '.join(record)}. Give {name.replace('_', '-')}'s column.",
                )
            row[name] = record[column]
        yield where, row
