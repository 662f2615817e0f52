"""What an observer is.

Observers are called in one order on all ranks, so that what they tell each other stays aligned. Their state is JSON
and is in every checkpoint.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from fastft.config import Section
from fastft.lazy import torch

if TYPE_CHECKING:
    from fastft.assemble import Job
    from fastft.tasks.base import Task
    from fastft.track import Telemetry
    from fastft.train.schedule import Schedule

Metrics = dict[str, dict[str, float]]  # by evaluation set


@dataclass(frozen=True)
class Stop:
    """End the run here, as if this had been its last step."""

    reason: str


@dataclass(frozen=True)
class Save:
    """Write a checkpoint now."""


@dataclass(frozen=True)
class Evaluate:
    """Evaluate now."""


Action = Stop | Save | Evaluate


@dataclass(frozen=True)
class StepResult:
    """An optimizer step that was just taken.

    Attributes
    ----------
    step : int
        How many have been taken.
    loss : Tensor
        0-dim: this rank's share of the step's loss, times the number of ranks; ``mean_loss`` is that of all.
    skipped : bool or Tensor
        Whether it changed nothing, for NaN or Inf gradients; a 0-dim tensor where that is known on the device alone,
        which only a logging step should wait for.
    logging : bool
        Whether this step is logged.
    """

    step: int
    loss: torch.Tensor
    skipped: bool | torch.Tensor
    logging: bool
    mean_loss: Callable[[], float]


@dataclass(frozen=True)
class View:
    """What an observer may look at."""

    job: Job
    schedule: Schedule
    log: Telemetry
    observers: Mapping[str, Observer] = field(default_factory=dict)


class Observer(ABC):
    """Watches a run. Every method may be left out.

    Class attributes
    ----------------
    Settings : Section type
        What stands under its key of ``train``, for those that are chosen there.
    exports_best : bool
        Whether the run exports its best checkpoint's model (checkpoint.best_by), not its last step's.
    needs_start : bool
        Whether it is to know the metrics of the model before training (``at_start``).
    """

    Settings: ClassVar[type[Section]] = Section
    exports_best: ClassVar[bool] = False
    needs_start: ClassVar[bool] = False

    def __init__(self, settings: Any, view: View):
        self.settings, self.view = settings, view

    @classmethod
    def check_task(cls, settings: Any, task: Task) -> None:
        """Before anything is built. Raises UserError where the task gives nothing to watch."""

    def at_start(self, metrics: Metrics) -> None:
        """Of the model before training, where it is evaluated."""

    def accepts(self, metrics: Metrics) -> bool:
        """Whether the model of these metrics may be the run's best."""
        return True

    def before_update(self, step: int) -> None:
        """Between the last backward of a step and its update; ``step`` is the one being taken, counted from 1."""

    def after_step(self, result: StepResult) -> list[Action]:
        return []

    def after_evaluation(self, step: int, metrics: Metrics) -> list[Action]:
        return []

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None: ...

    def summary(self) -> dict[str, Any]:
        """What the record of the run's end says of it."""
        return {}
