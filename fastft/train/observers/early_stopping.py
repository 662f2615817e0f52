"""Early stopping: a run ends when an evaluation's metric no longer improves, and exports its best model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from fastft import rooms
from fastft.config import Config, Section
from fastft.train.observers.base import Action, Metrics, Observer, Save, Stop, View

if TYPE_CHECKING:
    from fastft.tasks.base import Task

KEY = "train.early_stopping.metric"


class EarlyStoppingSettings(Section):
    """What must improve, and how long it may fail to."""

    scalar: ClassVar = "metric"

    metric: str = Field(
        description="SET.METRIC (test.accuracy, eval.loss); which way is better is the metric's own. It is also "
        "checkpoint.best_by."
    )
    patience: int = Field(3, ge=1, description="Stop after so many evaluations in a row without an improvement.")
    min_delta: float = Field(0.0, ge=0, description="What is better by this much or less is no improvement.")
    threshold: float | None = Field(None, description="Stop as soon as the metric is this good.")

    def check(self, config: Config) -> None:
        if config.train.eval_every is None:
            raise ValueError(
                "train.early_stopping needs train.eval_every: without it the only evaluation is at the run's end"
            )

    def implied(self) -> dict[str, Any]:
        return {"checkpoint.best_by": self.metric}


@rooms.OBSERVERS.register("early_stopping")
class EarlyStopping(Observer):
    """Ends the run after ``patience`` evaluations without improvement; the best model is exported.

    A checkpoint is written wherever the metric is the best so far. Patience goes by the value at the last improvement
    by more than ``min_delta``. NaN and Inf are never best and are no improvement.
    """

    Settings = EarlyStoppingSettings
    exports_best = True

    def __init__(self, settings: Any, view: View):
        super().__init__(settings, view)
        self.metric = view.job.task.metric(settings.metric, KEY)
        self.best: float | None = None  # of all evaluations
        self.reference: float | None = None  # at the last improvement
        self.waited = 0  # evaluations since then

    @classmethod
    def check_task(cls, settings: Any, task: Task) -> None:
        task.metric(settings.metric, KEY)

    def after_evaluation(self, step: int, metrics: Metrics) -> list[Action]:
        settings, metric = self.settings, self.metric
        value = metrics[settings.metric.rpartition(".")[0]][metric.name]
        finite = math.isfinite(value)
        best = finite and (self.best is None or metric.better(value, self.best))
        needed = self.reference
        if needed is not None:
            needed += -settings.min_delta if metric.lower_is_better else settings.min_delta
        improved = finite and (needed is None or metric.better(value, needed))
        self.waited = 0 if improved else self.waited + 1
        if best:
            self.best = value
        if improved:
            self.reference = value
        actions: list[Action] = [Save()] if best else []
        if finite and settings.threshold is not None and not metric.better(settings.threshold, value):
            actions.append(Stop(f"{settings.metric} {value:.6g} reached the threshold {settings.threshold:g}"))
        elif self.waited >= settings.patience:
            shown = "none was finite" if self.best is None else f"best {self.best:.6g}"
            actions.append(Stop(f"{settings.metric} did not improve in {self.waited} evaluations ({shown})"))
        return actions

    def state(self) -> dict[str, Any]:
        values = {"best": self.best, "reference": self.reference, "waited": self.waited}
        return {"metric": self.settings.metric, **values}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["metric"] != self.settings.metric:  # another one is watched since the resume: a new count begins
            return
        self.best, self.reference, self.waited = state["best"], state["reference"], state["waited"]

    def summary(self) -> dict[str, Any]:
        return {"evaluations_without_improvement": self.waited}
