"""The model's five constants, by least squares on published measurements with up to 128 GPUs; and what it then says about more."""

import functools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np

from fastft.plan.model import Constants, step
from fastft.plan.published import Point, llm_foundry

FITTED_UP_TO = 128  # GPUs
START = Constants(kernel_efficiency=0.6, activation_traffic=100.0, recompute_share=1.0, exposed_share=0.5, hop_latency=1e-6)


@dataclass(frozen=True)
class Fit:
    """Constants, the relative standard error of each, and the root mean square of the relative residuals."""

    constants: Constants
    standard_errors: Constants
    residual: float


@dataclass(frozen=True)
class Row:
    """A published point beside the model."""

    point: Point
    predicted: float  # tokens per second and GPU
    fitted: bool  # whether the constants have seen it

    @property
    def error(self) -> float:
        """Relative: positive where the model is too fast."""
        return self.predicted / self.point.tokens_per_second - 1


def fit(points: Sequence[Point], start: Constants = START, iterations: int = 100) -> Fit:
    """Levenberg-Marquardt on the logarithms of constants (all positive) and of throughputs (so that every point counts by its relative error).

    Raises
    ------
    ValueError
        If there are no more points than constants.
    """
    if len(points) <= len(astuple(start)):
        raise ValueError(f"{len(points)} points for {len(astuple(start))} constants")

    def residuals(x: np.ndarray) -> np.ndarray:
        constants = Constants(*np.exp(x))
        return np.array([math.log(step(p.setup, constants).tokens_per_second / p.tokens_per_second) for p in points])

    x, damping = np.log(astuple(start)), 1e-3
    r = residuals(x)
    for _ in range(iterations):
        jacobian = _jacobian(residuals, x)
        normal = jacobian.T @ jacobian
        move = np.linalg.solve(normal + damping * np.eye(len(x)), -jacobian.T @ r)
        tried = residuals(x + np.clip(move, -1, 1))
        if tried @ tried < r @ r:
            x, r, damping = x + np.clip(move, -1, 1), tried, damping / 10
        else:
            damping *= 10
        if np.abs(move).max() < 1e-9:
            break
    variance = r @ r / (len(points) - len(x))
    errors = np.sqrt(variance * np.diag(np.linalg.inv(normal)))
    return Fit(Constants(*np.exp(x).tolist()), Constants(*errors.tolist()), math.sqrt(r @ r / len(points)))


def _jacobian(residuals, x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    columns = [(residuals(x + h * unit) - residuals(x - h * unit)) / (2 * h) for unit in np.eye(len(x))]
    return np.stack(columns, axis=1)


@functools.cache
def calibrated() -> Fit:
    """The fit on llm-foundry's points of up to 128 GPUs."""
    return fit([p for p in llm_foundry() if p.setup.world_size <= FITTED_UP_TO])


def validation() -> list[Row]:
    """Every published point beside the calibrated model."""
    constants = calibrated().constants
    return [Row(p, step(p.setup, constants).tokens_per_second, p.setup.world_size <= FITTED_UP_TO) for p in llm_foundry()]


def constant_names() -> list[str]:
    return [f.name for f in fields(Constants)]
