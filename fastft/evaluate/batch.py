"""The packed sequences of a training step, for `fastft inspect --batch`: as the model is given them."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fastft import config as configuration
from fastft.assemble import Job
from fastft.data.orders.base import Samples
from fastft.errors import UserError
from fastft.evaluate.trace import samples_of
from fastft.tasks._decoder import DecoderTask
from fastft.tasks.base import IGNORE, Draw


def batch(path: Path, overrides: list[str], step: int) -> list[dict[str, Any]]:
    """The sequences of step ``step`` (counted from 1), each collated by itself.

    Parameters
    ----------
    path : Path
        A run folder, or a configuration file.

    Returns
    -------
    list of dict
        ``sample``, ``tokens`` (ids as the model sees them, without padding), ``padding`` (tokens behind them),
        ``targets`` (positions of the tokens that are predicted), ``labels`` (the token at each), and ``documents``:
        ``where``, ``start`` and ``stop`` of the tokens that attend to each other and to no other one, ``targets`` (how
        many) and ``text``.

    Raises
    ------
    UserError
        As ``trace`` does; for a task that does not learn from packed documents.
    """
    config, is_run = configuration.load_either(path, overrides)
    job, samples = samples_of(config, step, path if is_run else None, "--batch")
    assert job.train is not None
    if "packs" not in job.train.data.columns:
        raise UserError(
            f"--batch: task {config.task} learns from rows by themselves, which are not packed.",
            "fastft trace --step names the rows of a step.",
        )
    return [_one(job, samples, row) for row in range(len(samples.ids))]


def _one(job: Job, samples: Samples, row: int) -> dict[str, Any]:
    split, task = job.train, job.task
    assert split is not None
    sample = int(samples.ids[row])
    made = task.collate(split, np.array([sample]), Draw(job.config.run.seed, samples.epochs[row : row + 1]))
    tokens = np.asarray(made.inputs["input_ids"]).ravel()
    labels = np.asarray(made.labels).ravel()
    if isinstance(task, DecoderTask):  # position t predicts token t + 1
        labels = np.concatenate([[IGNORE], labels[:-1]])
    real = int(split.lengths[sample])
    targets = np.flatnonzero(labels[:real] != IGNORE)
    starts = [start for start in _starts(made.inputs) if start < real]
    documents = [
        {
            "where": where,
            "start": start,
            "stop": stop,
            "targets": int(np.count_nonzero((targets >= start) & (targets < stop))),
            "text": task.processor.decode(tokens[start:stop].tolist()),  # type: ignore[attr-defined]
        }
        for where, (start, stop) in zip(task.documents(split, sample), pairwise([*starts, real]), strict=True)
    ]
    return {
        "sample": sample,
        "tokens": tokens[:real].tolist(),
        "padding": len(tokens) - real,
        "targets": targets.tolist(),
        "labels": labels[targets].tolist(),
        "documents": documents,
    }


def _starts(inputs: Any) -> list[int]:
    """Where documents begin in a row of its own, padding being one: by the mask where there is one, else by positions
    that begin anew.
    """
    mask = np.asarray(inputs["attention_mask"]) if "attention_mask" in inputs else None
    if mask is not None and mask.ndim == 4:  # (1, 1, T, T): who sees whom
        return [0, *(np.flatnonzero(~np.diagonal(mask[0, 0], -1).astype(bool)) + 1).tolist()]
    if "position_ids" in inputs:
        positions = np.asarray(inputs["position_ids"]).ravel()
        return [0, *(np.flatnonzero(np.diff(positions) <= 0) + 1).tolist()]
    return [0]
