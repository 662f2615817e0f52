"""Which samples each step takes, and how many steps there are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from fastft.config import Config
from fastft.config.every import interval
from fastft.data.orders.base import Order, Samples
from fastft.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """How many sequences a step takes and how many steps there are.

    A step takes the next ``size`` positions of the endless sample order; the last one of a run counted in epochs may be
    short. ``segments`` says where a run was resumed after a short one: (steps, positions) done by then, ascending.
    """

    order: Order
    size: int
    total: int
    positions: int
    segments: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, config: Config, order: Order, max_length: int, segments: Iterable[Iterable[int]] = ()) -> Schedule:
        """UserError where the sources of a mixture do not last."""
        schedule = cls._of(config, order, max_length, segments)
        if order.limit is not None and schedule.positions > order.limit:
            raise UserError(
                f"data.train: every source has been read as often as its epochs say after {order.limit:,} samples "
                f"({order.limit // schedule.size:,} whole steps); the run takes {schedule.positions:,}.",
                "Lower train.steps or train.epochs, raise the sources' epochs, or leave one source without.",
            )
        return schedule

    @classmethod
    def _of(cls, config: Config, order: Order, max_length: int, segments: Iterable[Iterable[int]]) -> Schedule:
        size = config.batch.sequences(max_length)
        before = tuple((steps, taken) for steps, taken in segments)
        steps, taken = before[-1] if before else (0, 0)
        if config.train.steps is not None:
            total = config.train.steps
            return cls(order, size, total, taken + max(0, total - steps) * size, before)
        positions = max(1, round((config.train.epochs or 1.0) * order.rows_per_epoch))
        return cls(order, size, steps + max(0, math.ceil((positions - taken) / size)), positions, before)

    def taken(self, step: int) -> int:
        """Positions that the first ``step`` steps take."""
        segments = ((0, 0), *self.segments)
        steps, taken = [segment for segment in segments if segment[0] <= step][-1]
        end = taken + (step - steps) * self.size
        return min(end, self.positions) if steps == segments[-1][0] < step else end

    def samples(self, step: int) -> Samples:
        """Samples of the step after the first ``step``."""
        return self.order.samples(self.taken(step), self.taken(step + 1))

    def epoch(self, step: int) -> float:
        """Passes over the training data in the first ``step`` steps."""
        return self.taken(step) / self.order.rows_per_epoch

    def segments_at(self, step: int) -> list[tuple[int, int]]:
        """What a run that is resumed here must know to take the position after the last one."""
        steps, taken = self.segments[-1] if self.segments else (0, 0)
        end = self.taken(step)
        return [*self.segments, *([(step, end)] if end < taken + (step - steps) * self.size else [])]


class Due:
    """Whether something that happens every so often is due.

    Parameters
    ----------
    every : int, str or None
        As the configuration says it: steps, epochs, or a time; None: never.
    """

    def __init__(self, every: int | str | None, schedule: Schedule, now: float):
        self.interval = None if every is None else interval(every)
        self.schedule, self.since = schedule, now

    @property
    def by_time(self) -> bool:
        return self.interval is not None and self.interval.seconds is not None

    def at(self, step: int, now: float) -> bool:
        """After ``step`` steps. By time: at ``now``, counted from the last time that it was due, on this rank's
        clock.
        """
        if self.interval is None:
            return False
        if self.interval.steps is not None:
            return step % self.interval.steps == 0
        if self.interval.epochs is not None:
            before, after = (self.schedule.epoch(s) / self.interval.epochs for s in (step - 1, step))
            return math.floor(after + 1e-9) > math.floor(before + 1e-9)
        assert self.interval.seconds is not None
        return now - self.since >= self.interval.seconds

    def done(self, now: float) -> None:
        self.since = now
