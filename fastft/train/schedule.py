"""Which samples each step takes, and how many steps there are."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastft.config import Config
from fastft.data import order
from fastft.errors import UserError


@dataclass(frozen=True)
class Schedule:
    """How many sequences a step takes and how many steps there are.

    A step takes the next ``size`` positions of the endless sample order; the last one of a run counted in epochs may be short. ``knots`` says where
    a run went on after a short one: (steps, positions) done by then, ascending.
    """

    size: int
    total: int
    positions: int
    knots: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, config: Config, n: int, max_length: int, knots: Iterable[Iterable[int]] = ()) -> "Schedule":
        size = config.batch.size
        if config.batch.global_tokens is not None:
            size = config.batch.global_tokens // max_length
            if size == 0:
                raise UserError(
                    f"batch.global_tokens = {config.batch.global_tokens} is less than one sequence (data.max_length = {max_length}).",
                    "Raise batch.global_tokens or lower data.max_length.",
                )
        size = size or 32
        knots = tuple((steps, taken) for steps, taken in knots)
        steps, taken = knots[-1] if knots else (0, 0)
        if config.train.steps is not None:
            total = config.train.steps
            return cls(size, total, taken + max(0, total - steps) * size, knots)
        positions = max(1, round((config.train.epochs or 1.0) * n))
        return cls(size, steps + max(0, math.ceil((positions - taken) / size)), positions, knots)

    def taken(self, step: int) -> int:
        """Positions that the first ``step`` steps take."""
        knots = ((0, 0), *self.knots)
        steps, taken = [knot for knot in knots if knot[0] <= step][-1]
        end = taken + (step - steps) * self.size
        return min(end, self.positions) if steps == knots[-1][0] < step else end

    def ids(self, step: int, n: int, seed: int) -> np.ndarray:
        """Samples of the step after the first ``step``."""
        return order.sample_ids(n, seed, self.taken(step), self.taken(step + 1))

    def knots_at(self, step: int) -> list[tuple[int, int]]:
        """What a run that goes on from here must know to take the position after the last one."""
        steps, taken = self.knots[-1] if self.knots else (0, 0)
        end = self.taken(step)
        return [*self.knots, *([(step, end)] if end < taken + (step - steps) * self.size else [])]
