"""Evaluation of a split by all ranks together."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist

from fastft.data import batches
from fastft.tasks import Split, Task
from fastft.train.engine import Ranks

WINDOW = 1024  # sequences planned at a time: enough to sort by length, small enough for the planner's quadratic cost


def evaluate(
    model: torch.nn.Module, task: Task, split: Split, ranks: Ranks, beat: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """The task's metrics over every sequence of the split, the same numbers on every rank.

    ``model`` is anything callable as the Hugging Face model is: the model itself, or the DeepSpeed engine around it.
    ``beat`` is called after every batch.
    """
    was_training = model.training
    model.eval()
    metrics = task.new_metrics()
    with torch.inference_mode(), ThreadPoolExecutor(1) as ahead:
        plan = [
            micro[ranks.rank]
            for start in range(0, len(split), WINDOW)
            for micro in _plan(task, split, start, ranks.world)
        ]
        coming = ahead.submit(task.collate, split, plan[0])
        for i in range(len(plan)):
            batch = coming.result().to(ranks.device)
            if i + 1 < len(plan):
                coming = ahead.submit(task.collate, split, plan[i + 1])
            task.forward_metrics(model, batch, metrics)
            beat()
    model.train(was_training)
    states = [metrics.state()]
    if ranks.world > 1:
        states = [None] * ranks.world
        dist.all_gather_object(states, metrics.state())
    return metrics.finish(states)


def _plan(task: Task, split: Split, start: int, world: int) -> batches.Plan:
    ids = np.arange(start, min(start + WINDOW, len(split)))
    return batches.by_length(ids, split.lengths[ids], world, task.config.batch.micro_tokens)
