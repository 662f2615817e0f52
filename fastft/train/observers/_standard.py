"""The observers that every run has, in their order. Their settings are keys of older standing, in several sections."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

import torch

from fastft.errors import UserError
from fastft.train import health
from fastft.train.observers.base import Action, Metrics, Observer, StepResult, View


class Weights(Observer):
    """Compares replicated weights between ranks (parallel.verify_every).

    Before the update: after it ZeRO 1 and 2 have just rewritten all replicated weights from the shards.
    """

    def before_update(self, step: int) -> None:
        parallel, ranks = self.view.job.config.parallel, self.view.job.ranks
        every = parallel.verify_every
        if every and step % every == 0 and not ranks.alone and parallel.zero < 3:
            health.check_weights(self.view.job.model, ranks, step)


class Skips(Observer):
    """Counts steps skipped for NaN or Inf gradients; ends the run after too many in a row (train.max_skipped).

    What is known on a GPU alone is read at logging steps, and after as many steps as may be skipped, so that the others
    do not wait for it.
    """

    def __init__(self, settings: Any, view: View):
        super().__init__(settings, view)
        self.in_a_row = self.total = 0
        self.pending: list[tuple[int, bool | torch.Tensor]] = []

    def after_step(self, result: StepResult) -> list[Action]:
        self.pending.append((result.step, result.skipped))
        on_device = isinstance(result.skipped, torch.Tensor) and result.skipped.is_cuda
        if not on_device or result.logging or len(self.pending) > self.view.job.config.train.max_skipped:
            self._read()
        return []

    def _read(self) -> None:
        pending, self.pending = self.pending, []
        for step, skipped in pending:
            self._count(step, bool(skipped))

    def _count(self, step: int, skipped: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped
        if skipped:
            ids = self.view.schedule.samples(step - 1).ids.tolist()
            self.view.log.record("skipped", step=step, samples=ids)
            self.view.log.warn(f"step {step}: NaN or Inf gradients; the step was skipped")
        if self.in_a_row > self.view.job.config.train.max_skipped:
            raise UserError(
                f"{self.in_a_row} steps in a row had NaN or Inf gradients (the last at step {step}).",
                "Lower optim.lr, check the data (the samples are in metrics.jsonl), or raise train.max_skipped.",
            )

    def state(self) -> dict[str, Any]:
        self._read()
        return {"skipped_in_a_row": self.in_a_row, "skipped_total": self.total}

    def load_state(self, state: dict[str, Any]) -> None:
        self.in_a_row, self.total = state["skipped_in_a_row"], state["skipped_total"]


class Spikes(Observer):
    """Ends the run at a loss many times the usual (train.spike_factor)."""

    def __init__(self, settings: Any, view: View):
        super().__init__(settings, view)
        self.recent: deque[float] = deque(maxlen=50)

    def after_step(self, result: StepResult) -> list[Action]:
        config = self.view.job.config
        factor = config.train.spike_factor
        if factor is None:
            return []
        value = result.mean_loss()
        usual = statistics.median(self.recent) if len(self.recent) == self.recent.maxlen else math.inf
        self.recent.append(value)
        if value > factor * usual:
            samples = self.view.schedule.samples(result.step - 1).ids.tolist()
            self.view.log.record("spike", step=result.step, loss=value, usual=usual, samples=samples)
            named = ", ".join(map(str, samples[:8])) + (", ..." if len(samples) > 8 else "")
            raise UserError(
                f"step {result.step}: the loss {value:.4g} is more than {factor} times the usual {usual:.4g}; "
                f"samples {named}.",
                f"`fastft replay {config.run.dir} --step {result.step}` shows each sample; "
                f"`fastft resume {config.run.dir}` goes back to the checkpoint before it.",
            )
        return []


class Stragglers(Observer):
    """Names ranks that are slower than the others, at logging steps."""

    def __init__(self, settings: Any, view: View):
        super().__init__(settings, view)
        self.timer = health.ForwardTimer(view.job.ranks.device)  # used by the loop around every forward

    def after_step(self, result: StepResult) -> list[Action]:
        ranks = self.view.job.ranks
        if result.logging and not ranks.alone and (slow := self.timer.slow_ranks(ranks)):
            self.view.log.record("slow_ranks", step=result.step, times=slow)
            named = ", ".join(f"rank {rank} takes {times:.1f} times the others' time" for rank, times in slow.items())
            self.view.log.warn(f"step {result.step}: slow: {named}")
        return []


class MixtureShares(Observer):
    """Records what each source of a mixture has given so far, at logging steps and at the end."""

    step = 0

    def after_step(self, result: StepResult) -> list[Action]:
        if result.logging and (shares := self._shares(result.step)):
            self.view.log.record("mixture", step=result.step, sources=shares)
        self.step = result.step
        return []

    def _shares(self, step: int) -> dict[str, dict[str, float]]:
        schedule = self.view.schedule
        return schedule.order.shares(schedule.taken(step))

    def summary(self) -> dict[str, Any]:
        shares = self._shares(self.step)
        return {"mixture": shares} if shares else {}


class Best(Observer):
    """Knows the best value of checkpoint.best_by; the checkpoint of the same step, where one is due, becomes BEST."""

    def __init__(self, settings: Any, view: View):
        super().__init__(settings, view)
        self.best: dict[str, Any] | None = None  # step, metric and value of the best checkpoint
        self.candidate: dict[str, Any] | None = None  # of an evaluation, until a checkpoint is written at its step
        self.metrics: Metrics = {}  # all of the best's
        self.latest: Metrics = {}
        self.name = view.job.config.checkpoint.best_by
        self.metric = view.job.task.metric(self.name, "checkpoint.best_by") if self.name else None

    def after_evaluation(self, step: int, metrics: Metrics) -> list[Action]:
        if self.metric is not None and self.name is not None:
            value = metrics[self.name.rpartition(".")[0]][self.metric.name]
            # NaN is neither better nor worse than anything.
            better = self.best is None or self.metric.better(value, self.best["value"])
            ours = math.isfinite(value) and better and all(o.accepts(metrics) for o in self.view.observers.values())
            self.candidate = {"step": step, "metric": self.name, "value": value} if ours else None
            self.latest = {name: dict(found) for name, found in metrics.items()}
        return []

    def saved(self, step: int) -> bool:
        """Whether the checkpoint of this step is the best; called before it is written."""
        if self.candidate is None or self.candidate["step"] != step:
            return False
        self.best, self.candidate = self.candidate, None
        self.metrics = self.latest
        return True

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "metrics": self.metrics}

    def load_state(self, state: dict[str, Any]) -> None:
        if state["best"] is None or self.name in (None, state["best"]["metric"]):  # of another one it says nothing
            self.best, self.metrics = state["best"], state.get("metrics", {})  # fastft 0.1.0 kept no metrics


STANDARD: dict[str, type[Observer]] = {
    "weights": Weights,
    "skips": Skips,
    "spikes": Spikes,
    "stragglers": Stragglers,
    "mixture": MixtureShares,
    "best": Best,
}


def upgraded(state: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The observers' states in a checkpoint's; fastft 0.1.0 kept them beside everything else."""
    if "observers" in state:
        return state["observers"]
    skips = {name: state[name] for name in ("skipped_in_a_row", "skipped_total")}
    return {"skips": skips, "best": {"best": state.get("best")}}
