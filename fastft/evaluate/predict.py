"""Predictions for rows of a file, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from fastft import assemble
from fastft import config as configuration
from fastft.assemble import Job
from fastft.data import formats
from fastft.data.formats.base import MISSING, value_of
from fastft.errors import UserError, did_you_mean
from fastft.inference.base import Predictor, Row, kept_beside, rounded
from fastft.ranks import Ranks
from fastft.zero.engine import start_process_group


def predictor(path: str, options: dict, task: str | None = None) -> Predictor:
    """That of an exported model, a run folder, or a hub id.

    Parameters
    ----------
    options : dict
        Values for the task's ``Predict`` section; None: its default.
    task : str, optional
        Of a model that no task has trained; default: the one that it fits.

    Raises
    ------
    UserError
        No such model, or an option that the task does not have.
    """
    return _of(assemble.trained(path, task), options)


def together(path: str, options: dict) -> tuple[Predictor, Ranks, bool]:
    """The same for processes that predict together: the predictor, the ranks, which are in a process group where they
    are several, and whether they hold the model in shards. It is what ``predict`` is to be given.
    """
    job = assemble.trained(path, together=True)
    if not job.ranks.alone:
        start_process_group()
    if job.sharded:  # they compute the same rows, and draw the same tokens
        torch.manual_seed(job.ranks.from_main(torch.initial_seed()))
    return _of(job, options), job.ranks, job.sharded


def _of(job: Job, options: dict) -> Predictor:
    given = {name: value for name, value in options.items() if value is not None}
    section = configuration.section(type(job.task).Predict, given, f"fastft predict ({job.config.task})")
    return job.task.predictor(job.model, job.learned, section)


def predict(
    predictor: Predictor,
    rows: Iterable[tuple],
    batch_size: int = 32,
    top_k: int | None = None,
    ranks: Ranks | None = None,
    sharded: bool = False,
) -> Iterator[dict]:
    """One record per row, in order.

    Parameters
    ----------
    rows : iterable of (where, row) or (where, row, kept)
        A row maps the predictor's ``fields`` to values; kept: columns that are copied into the record, as
        ``kept_beside`` names them.
    top_k : int, optional
        Keep so many of the ``scores``, the highest.
    ranks : Ranks, optional
        Those that share the rows, in a process group: each is given all of them, takes a batch in turn, and rank 0
        gets every record, the others none.
    sharded : bool
        Whether ranks hold the model in shards: then all of them compute all rows.

    Raises
    ------
    UserError
        A row that the predictor refuses, named; ``top_k`` where the task gives no scores.
    """
    rows = iter(rows)
    if ranks is None or ranks.alone or sharded:
        while chunk := list(islice(rows, batch_size)):
            records = _predicted(predictor, chunk, top_k)
            if ranks is None or ranks.main:
                yield from records
        return
    while chunk := list(islice(rows, batch_size * ranks.world)):
        own = chunk[batch_size * ranks.rank :][:batch_size]
        every = ranks.gather(_predicted(predictor, own, top_k) if own else [])
        if ranks.main:
            yield from (record for part in every for record in part)


def _predicted(predictor: Predictor, chunk: list[tuple], top_k: int | None) -> list[dict]:
    prepared = [predictor.prepare(where, row) for where, row, *_ in chunk]
    with torch.inference_mode():
        records = predictor.run(prepared)
    found = []
    for record, (_, _, *kept) in zip(records, chunk, strict=True):
        if top_k is not None:
            _keep_top(record, top_k)
        found.append(kept_beside(kept[0] if kept else {}, rounded(record)))
    return found


def _keep_top(record: dict, top_k: int) -> None:
    if "scores" not in record:
        raise UserError("--top-k: this model's task gives no scores.", f"It gives: {', '.join(record)}.")
    best = sorted(record["scores"].items(), key=lambda pair: -pair[1])
    record["scores"] = dict(best[:top_k])


def read(
    predictor: Predictor, source: configuration.Source, columns: dict[str, str | None], keep: Sequence[str] = ()
) -> Iterator[tuple[str, Row, dict[str, Any]]]:
    """Rows of a data file: where each was read, its fields, and the columns to ``keep``.

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
            value = value_of(record, column)
            if value is None or value is MISSING:
                if name in predictor.optional:
                    continue
                raise UserError(
                    f"{where}: no {name} in column {column!r}.",
                    f"Columns: {', '.join(record)}. Name the column of {name.replace('_', ' ')}.",
                )
            row[name] = value
        if missing := [column for column in keep if column not in record]:
            raise UserError(f"{where}: no column {missing[0]!r} to keep.", did_you_mean(missing[0], record))
        yield where, row, {column: record[column] for column in keep}
