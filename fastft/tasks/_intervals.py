"""How sure metrics are: intervals by the bootstrap."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fastft.tasks.base import SampleMetrics

SHARE = 0.95  # of the resampled values that lie in an interval


def intervals(
    metrics: SampleMetrics, columns: dict[str, np.ndarray], names: Iterable[str], resamples: int
) -> dict[str, list[float]]:
    """Lower and upper end by metric: percentiles over sets of as many samples, drawn anew with replacement (Efron 1979,
    10.1214/aos/1176344552). The same for the same samples in the same order.

    Parameters
    ----------
    columns : dict of (samples, ...) arrays
        Of all ranks.
    names : iterable of str
        Metrics wanted; those that are not of single samples are left out.
    """
    if not columns:
        return {}
    lengths, generator = sorted({len(column) for column in columns.values()}), np.random.default_rng(0)
    found: dict[str, list[float]] = {}
    for _ in range(resamples):
        which = {samples: generator.integers(samples, size=samples) for samples in lengths}
        drawn = {name: column[which[len(column)]] for name, column in columns.items()}
        for name, value in metrics.numbers(drawn).items():
            found.setdefault(name, []).append(value)
    outside = (1 - SHARE) / 2
    wanted = [name for name in names if name in found and not np.isnan(found[name]).all()]
    return {name: np.nanquantile(found[name], (outside, 1 - outside)).tolist() for name in wanted}
