"""Tasks: how examples become features, which model class, which loss, which metrics. One file each, registered below."""

from fastft.tasks import causal_lm, classification  # noqa: F401  (they register themselves)
from fastft.tasks.base import TASKS, Batch, Split, Task

__all__ = ["TASKS", "Batch", "Split", "Task"]
