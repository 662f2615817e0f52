"""The model's five constants, by least squares on published measurements.

Fitted on up to 128 GPUs it is held to those on 256 and 512 (`validation`); a plan is made with the constants of all of
them, since the small runs alone determine the latency per hop only to a factor of about two.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import numpy as np

from fastft.plan.model import Constants, step
from fastft.plan.published import Point, llm_foundry

FITTED_UP_TO = 128  # GPUs
START = Constants(
    kernel_efficiency=0.6, activation_traffic=100.0, recompute_share=1.0, exposed_share=0.5, hop_latency=1e-6
)


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
    """Levenberg-Marquardt on the logarithms of constants (all positive)
    and of throughputs (so that every point counts by its relative error).

    Raises
    ------
    ValueError
        If there are no more points than constants, or the points do not determine them.
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
    if np.linalg.matrix_rank(normal, hermitian=True) < len(x):
        raise ValueError("the points do not determine every constant")
    errors = np.sqrt(r @ r / (len(points) - len(x)) * np.diag(np.linalg.inv(normal)))
    return Fit(Constants(*np.exp(x).tolist()), Constants(*errors.tolist()), math.sqrt(r @ r / len(points)))


def _jacobian(residuals, x: np.ndarray, h: float = 1e-5) -> np.ndarray:
    columns = [(residuals(x + h * unit) - residuals(x - h * unit)) / (2 * h) for unit in np.eye(len(x))]
    return np.stack(columns, axis=1)


@functools.cache
def calibrated(up_to: int | None = None) -> Fit:
    """The fit on llm-foundry's points: those of up to so many GPUs, to validate; all of them, to plan."""
    return fit([p for p in llm_foundry() if up_to is None or p.setup.world_size <= up_to])


def validation(up_to: int = FITTED_UP_TO) -> list[Row]:
    """Every published point beside the model that was fitted on those of up to so many GPUs."""
    constants = calibrated(up_to).constants
    return [Row(p, step(p.setup, constants).tokens_per_second, p.setup.world_size <= up_to) for p in llm_foundry()]
