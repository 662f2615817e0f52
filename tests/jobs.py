"""Runs put together in this process, without an engine, for tests of tasks and edits."""

import numpy as np
import torch

from fastft import assemble
from fastft import config as configuration
from fastft.assemble import Job
from fastft.data.split import Split
from fastft.tasks.base import Batch, Draw, Task


def task_of(config: dict) -> Task:
    """The task alone: nothing is read."""
    loaded = configuration.validate(config)
    return assemble.start(loaded).task


def job_of(config: dict, *, evals: bool = False) -> Job:
    """Data, model in evaluation mode, objective."""
    job = assemble.start(configuration.validate(config))
    assemble.add_data(job, evals=evals)
    assemble.add_model(job)
    assemble.add_objective(job)
    job.model.eval()
    return job


def collate(task: Task, split: Split, ids, epoch: int = 0) -> Batch:
    ids = np.asarray(ids, dtype=np.int64)
    return task.collate(split, ids, Draw(task.config.run.seed, np.full(len(ids), epoch)))


def batch_of(job: Job, ids, epoch: int = 0) -> Batch:
    """Training samples."""
    return collate(job.task, job.train, ids, epoch)


def loss_of(job: Job, batch: Batch, scale: float = 1.0) -> torch.Tensor:
    return job.objective.compute_loss(job.model, batch, torch.tensor(scale))
