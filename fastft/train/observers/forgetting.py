"""A budget of general loss: a run ends when it has forgotten more, and exports its best model within it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from pydantic import Field

from fastft import rooms
from fastft.config import Config, Section
from fastft.errors import UserError
from fastft.train.observers.base import Action, Metrics, Observer, Save, Stop, View

if TYPE_CHECKING:
    from fastft.tasks.base import Task


class ForgettingSettings(Section):
    """Two evaluation sets, and how much worse the general one may become."""

    domain: str = Field("domain", description="Evaluation set of what is learned; checkpoint.best_by is its loss.")
    general: str = Field("general", description="Evaluation set of what the model could do before.")
    budget: float | None = Field(
        None,
        ge=0,
        description="Stop when the general loss is more than this above that of the model before training (nats a "
        "token); null: it is only measured.",
    )

    def check(self, config: Config) -> None:
        if config.train.eval_every is None:
            raise ValueError(
                "train.forgetting needs train.eval_every: without it the only evaluation is at the run's end"
            )

    def implied(self) -> dict[str, Any]:
        return {} if self.budget is None else {"checkpoint.best_by": f"{self.domain}.loss"}


@rooms.OBSERVERS.register("forgetting")
class Forgetting(Observer):
    """Measures domain and general loss before the first step, and may end the run at a budget of general loss.

    With a budget a checkpoint is written wherever the domain's loss is the best so far within it; the best of them is
    exported. `fastft forgetting` draws the curves.
    """

    Settings = ForgettingSettings
    needs_start = True

    def __init__(self, settings: Any, view: View):
        super().__init__(settings, view)
        self.start: float | None = None  # general loss of the model before training
        self.best: float | None = None  # domain loss, of evaluations within the budget
        self.latest: dict[str, float] = {}

    @classmethod
    def check_task(cls, settings: Any, task: Task) -> None:
        for key in ("domain", "general"):
            task.metric(f"{getattr(settings, key)}.loss", f"train.forgetting.{key}")
        if settings.domain == settings.general:
            raise UserError(
                f"train.forgetting: domain and general are the same set, {settings.domain!r}.",
                "Name two sets of data.eval.",
            )

    @property
    def exports_best(self) -> bool:  # type: ignore[override]
        return self.settings.budget is not None

    def at_start(self, metrics: Metrics) -> None:
        self.start = metrics[self.settings.general]["loss"]
        self.latest = {"domain_at_start": metrics[self.settings.domain]["loss"], "general_at_start": self.start}

    def rise(self, metrics: Metrics) -> float:
        """How much general loss was added. UserError where it was not measured before training."""
        if self.start is None:
            raise UserError(
                "train.forgetting: this run was begun without it, or with other sets: the general loss of the model "
                "before training is not known.",
                "Resume with what it began with, or start a new run.",
            )
        return metrics[self.settings.general]["loss"] - self.start

    def accepts(self, metrics: Metrics) -> bool:
        return self.settings.budget is None or self.rise(metrics) <= self.settings.budget

    def after_evaluation(self, step: int, metrics: Metrics) -> list[Action]:
        settings, rise = self.settings, self.rise(metrics)
        domain = metrics[settings.domain]["loss"]
        self.latest |= {"domain": domain, "general": metrics[settings.general]["loss"], "general_rise": rise}
        if settings.budget is None:
            return []
        if not self.accepts(metrics):  # a rise that is no number, too
            if self.best is None:
                self.view.log.warn(
                    f"step {step}: no evaluation was within train.forgetting.budget: the model of the last step is "
                    "exported. A lower optim.lr, replay of general text or an earlier evaluation helps."
                )
            return [Stop(f"{settings.general}.loss rose by {rise:.4g}, more than the budget {settings.budget:g}")]
        if not math.isfinite(domain) or (self.best is not None and domain >= self.best):
            return []
        self.best = domain
        return [Save()]

    def state(self) -> dict[str, Any]:
        sets = {"domain": self.settings.domain, "general": self.settings.general}
        return {"sets": sets, "start": self.start, "best": self.best, "latest": self.latest}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["sets"] == {"domain": self.settings.domain, "general": self.settings.general}:
            self.start, self.best, self.latest = state["start"], state["best"], state["latest"]

    def summary(self) -> dict[str, Any]:
        return {"forgetting": self.latest}
