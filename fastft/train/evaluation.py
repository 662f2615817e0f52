"""Evaluation of a split by all ranks together."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastft.assemble import Job
from fastft.data import batches
from fastft.data.split import Split
from fastft.inference.forward import Forward
from fastft.tasks._intervals import intervals
from fastft.tasks.base import Batch, Draw, Metrics, SampleMetrics
from fastft.train.errors import write_worst

WINDOW = 1024  # sequences planned at a time: enough to sort by length, small enough for the planner's quadratic cost


@dataclass(frozen=True)
class Measured:
    """Metrics of a split, and a lower and upper end for each where ``evaluation.bootstrap`` asks for them; the same on
    every rank.
    """

    numbers: dict[str, float]
    intervals: dict[str, list[float]]


def evaluate(job: Job, name: str, step: int, forward: Any = None, beat: Callable[[], None] = lambda: None) -> Measured:
    """The task's metrics over every sequence of an evaluation set; the worst rows go to a file of the run.

    ``forward``, ``beat``: as ``measure`` has them.
    """
    metrics, ids = measure(job, job.evals[name], forward, beat)
    states = job.ranks.gather_data(metrics.state())
    numbers = metrics.finish(states)
    write_worst(job, name, metrics, ids, step)
    return Measured(numbers, intervals_of(job, metrics, states, job.config.evaluation.bootstrap))


def intervals_of(job: Job, metrics: Metrics, states: list, resamples: int) -> dict[str, list[float]]:
    """Of the task's metrics, from the states of all ranks; none where they are not of single samples."""
    if not resamples or not isinstance(metrics, SampleMetrics):
        return {}
    names = [metric.name for metric in job.task.metrics]
    return intervals(metrics, metrics.joined(states), names, resamples)


def measure(
    job: Job, split: Split, forward: Any = None, beat: Callable[[], None] = lambda: None
) -> tuple[Metrics, np.ndarray]:
    """What this rank's share of the split adds to the task's metrics, and its samples in that order.

    Parameters
    ----------
    forward : callable
        The DeepSpeed engine around the model; None: there is none, and every rank has the whole model.
    beat : callable
        Called after every batch.
    """
    engine = job.model if forward is None else forward
    assert job.measured is not None
    was_training = job.model.training
    engine.eval()
    sharded = forward is not None and job.config.parallel.zero == 3 and not job.ranks.alone
    called = Forward(engine, job.model, sharded)
    metrics = job.task.new_metrics(job.measured, job.learned)
    seed = job.config.run.seed

    def collate(ids: np.ndarray) -> Batch:
        return job.task.collate(split, ids, Draw.fixed(seed, len(ids)))

    with torch.inference_mode(), ThreadPoolExecutor(1) as ahead:
        starts = range(0, len(split), WINDOW)
        plan = [micro[job.ranks.data_rank] for start in starts for micro in _plan(job, split, start)]
        coming = ahead.submit(collate, plan[0])
        for i in range(len(plan)):
            batch = coming.result().to(job.ranks.device)
            if i + 1 < len(plan):
                coming = ahead.submit(collate, plan[i + 1])
            metrics.update(called, batch)
            beat()
        for _ in metrics.complete(called, lambda n: n if forward is None else job.ranks.max([n])[0]):
            beat()
    metrics.bring_together(job.ranks)
    engine.train(was_training)
    return metrics, np.concatenate(plan)


def _plan(job: Job, split: Split, start: int) -> batches.Plan:
    ids = np.arange(start, min(start + WINDOW, len(split)))
    world, most = job.ranks.data_world, job.config.batch.forward_tokens * job.ranks.sequence_world
    return batches.auto(ids, split.sizes[ids], world, most, job.task.pads, job.ranks.device.type, job.overhead)
