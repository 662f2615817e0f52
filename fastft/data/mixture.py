"""Mixtures: sources by their shares of the targets, in an order that is a function of the position.

Every source is read in its own keyed permutation, over and over. A sample is due when its source's share of all targets
taken reaches the middle of it: sorted by that, the streams become one (Webster's or Sainte-Lague's method of
apportionment, with targets for seats). So after any number of samples a source is off its share by at most
``(1 + w (n - 2)) / 2`` of the largest sample, w being its share and n the number of sources: less than one sample for
up to three of them. Whichever position is asked for, one epoch of each source is looked at.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np

from fastft.config import Order as OrderSettings
from fastft.config.mixture import Shares
from fastft.data import order
from fastft.data.orders.base import Order, Samples
from fastft.data.split import Split
from fastft.errors import UserError

FEW = 64  # rows that are left to be sorted when the search for a position ends
SLACK = 2  # rows of a source that rounding may put on the other side of a bound


class Stream:
    """One source, read over and over; ``row`` counts all rows that were read of it.

    Parameters
    ----------
    first, n : int
        Its samples: [first, first + n) of the split.
    """

    KEPT = 1 << 16  # rows whose order is kept, and at least two epochs: a step may end in one and begin in another

    def __init__(self, split: Split, first: int, n: int, seed: int):
        self.first, self.n, self.seed = first, n, seed
        self.targets = split.targets[first : first + n]
        self.total = float(np.sum(self.targets))
        self.largest = float(np.max(self.targets, initial=0))
        self._ends = OrderedDict[int, np.ndarray]()
        self._lock = threading.Lock()  # steps are collated beside the loop

    def ids(self, rows: np.ndarray) -> np.ndarray:
        """Samples of the split that are read as these rows, which rise."""
        if not len(rows):
            return rows
        return self.first + order.sample_ids(self.n, self.seed, int(rows[0]), int(rows[-1]) + 1)

    def targets_before(self, row: int) -> float:
        """Sum over the rows before."""
        epoch, within = divmod(row, self.n)
        return epoch * self.total + (float(self._epoch(epoch)[within - 1]) if within else 0.0)

    def middles(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) float64: targets before each row, and half of its own."""
        found = [np.zeros(0)]
        for epoch in range(start // self.n, -(-stop // self.n)):
            low, high = max(start - epoch * self.n, 0), min(stop - epoch * self.n, self.n)
            ends = np.concatenate([[0.0], self._epoch(epoch)[low - 1 if low else 0 : high]])
            ends = ends if not low else ends[1:]
            found.append(epoch * self.total + (ends[:-1] + ends[1:]) / 2)
        return np.concatenate(found)

    def rows_by(self, amount: float) -> int:
        """How many rows have their middle at ``amount`` targets or before, but for rounding."""
        epoch = max(int(amount // self.total), 0)
        ends, left = self._epoch(epoch), amount - epoch * self.total
        row = int(np.searchsorted(ends, left, side="right"))  # rows that end by then; half of the next may have come
        before = float(ends[row - 1]) if row else 0.0
        row += row < self.n and (before + float(ends[row])) / 2 <= left
        return epoch * self.n + row

    def _epoch(self, epoch: int) -> np.ndarray:
        """(n,) float64: targets of an epoch's rows, summed up to and with each."""
        with self._lock:
            if epoch not in self._ends:
                drawn = order.permute(self.n, self.seed, epoch, np.arange(self.n))
                self._ends[epoch] = np.cumsum(np.asarray(self.targets, np.float64)[drawn])
                while len(self._ends) > max(2, self.KEPT // self.n):
                    self._ends.popitem(last=False)
            return self._ends[epoch]


@dataclass(frozen=True)
class Phase:
    """A part of the run in which the shares are the same.

    Attributes
    ----------
    start : int
        Position of its first sample.
    rows : tuple of int
        Rows that were read of each source before.
    quota : tuple of float
        Targets that each source was to have given before.
    weights : tuple of float
        Shares of the sources, summing to 1; 0 for one that is left out.
    """

    start: int
    rows: tuple[int, ...]
    quota: tuple[float, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Part:
    """What a source has given to the first samples of a run.

    Attributes
    ----------
    planned, seen : float
        Share of all targets.
    passes : float
        How often it was read.
    """

    name: str
    rows: int
    targets: float
    planned: float
    seen: float
    passes: float


class Mixture(Order):
    """The order of a mixture.

    Parameters
    ----------
    steps : int or None
        Of the run, of which fractions of ``data.curriculum`` are parts; None: by ``epochs``.
    epochs : float
        Of the run.

    Raises
    ------
    UserError
        A source without samples; stages and ``epochs`` that leave nothing to read.
    """

    def __init__(
        self, shares: Shares, split: Split, seed: int, batch: int, steps: int | None = None, epochs: float = 1.0
    ):
        super().__init__(OrderSettings(), split, seed, batch)
        self.names, self.parts = [part.name for part in shares.parts], shares.parts
        starts = split.sample_starts()
        self.streams = [
            Stream(split, int(starts[part.first]), int(starts[part.last] - starts[part.first]), seed + i)
            for i, part in enumerate(shares.parts)
        ]
        self._check_streams(shares)
        if shares.by_epochs:
            times = [part.epochs or 1.0 for part in shares.parts]
            self._epoch_rows = max(1, round(sum(t * s.n for t, s in zip(times, self.streams, strict=True))))
            weights = [t * s.total for t, s in zip(times, self.streams, strict=True)]
            stages: list[tuple[int | None, list[float]]] = [(None, weights)]
            caps: list[int | None] = [None] * len(times)
        else:
            self._epoch_rows = len(split)
            total = steps or -(-max(1, round(epochs * len(split))) // batch)
            ends = [until if isinstance(until, int) else round(until * total) for until, _ in shares.stages]
            stages = [(end * batch, w) for end, (_, w) in zip(ends, shares.stages, strict=True)]
            stages.append((None, [part.weight for part in shares.parts]))
            caps = [
                None if part.epochs is None else max(1, round(part.epochs * stream.n))
                for part, stream in zip(shares.parts, self.streams, strict=True)
            ]
        self.caps = caps
        self.missed = [
            until
            for (until, _), (end, _), (before, _) in zip(shares.stages, stages, [(0, None), *stages], strict=False)
            if end == before
        ]  # stages that have no step
        self.phases: list[Phase] = []
        self._add_phases(stages)

    def _check_streams(self, shares: Shares) -> None:
        used = [
            shares.by_epochs or part.weight > 0 or any(weights[i] for _, weights in shares.stages)
            for i, part in enumerate(shares.parts)
        ]
        for name, stream, is_used in zip(self.names, self.streams, used, strict=True):
            if is_used and not (stream.n and stream.total):
                raise UserError(
                    f"data.train: the source {name!r} has nothing to learn from.", "Leave it out, or look at its files."
                )

    def _add_phases(self, stages: list[tuple[int | None, list[float]]]) -> None:
        start, rows = 0, [0] * len(self.streams)
        quota = [0.0] * len(self.streams)
        for end, given in stages:
            while end is None or start < end:
                weights = [
                    w if cap is None or row < cap else 0.0 for w, cap, row in zip(given, self.caps, rows, strict=True)
                ]
                if not (total := sum(weights)):
                    self._exhausted(start, end)
                    return
                phase = Phase(start, tuple(rows), tuple(quota), tuple(w / total for w in weights))
                self.phases.append(phase)
                until = self._first_cap(phase)
                last = until is None or (end is not None and until >= end)
                if last and end is None:
                    return
                start = end if last else until  # type: ignore[assignment]
                quota, rows = self._planned(start), self.rows(start).tolist()

    def _exhausted(self, start: int, end: int | None) -> None:
        if end is not None:
            raise UserError(
                f"data.curriculum: the stage until step {end // self.batch:,} has nothing left to read from step "
                f"{start // self.batch + 1:,} on: all its sources were read as often as their epochs say.",
                "Raise their epochs, or give other sources a weight in it.",
            )
        self.limit = start

    def _first_cap(self, phase: Phase) -> int | None:
        """The position at which a source has been read as often as it may be; None: never."""
        ends = []
        for i, cap in enumerate(self.caps):
            if cap is not None and phase.weights[i]:
                middle = float(self.streams[i].middles(cap - 1, cap)[0])
                time = (middle - phase.quota[i]) / phase.weights[i]
                ends.append((time, i, cap))
        if not ends:
            return None
        time, source, cap = min(ends)
        low, high = self._bounds(phase, time)
        _, sources, rows = self._due(phase, low, high)
        place = int(np.flatnonzero((sources == source) & (rows == cap - 1))[0])
        return phase.start + int(low.sum() - sum(phase.rows)) + place + 1

    @property
    def rows_per_epoch(self) -> int:
        return self._epoch_rows

    # -- positions
    # -------------------------------------------------------------------------------------------------------

    def _phase(self, position: int) -> Phase:
        return [phase for phase in self.phases if phase.start <= position][-1]

    def _bounds(self, phase: Phase, time: float) -> tuple[np.ndarray, np.ndarray]:
        """(sources,) int64 each: rows that are due before ``time`` for certain, and those that may be."""
        found = np.array(phase.rows)
        for i, stream in enumerate(self.streams):
            if phase.weights[i]:
                found[i] = stream.rows_by(phase.quota[i] + phase.weights[i] * time)
        least = np.array(phase.rows)
        used = np.array(phase.weights) > 0
        return np.maximum(found - SLACK, least), np.maximum(found + SLACK * used, least)

    def _due(self, phase: Phase, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """When they are due, source and row of the rows [low, high) of every source, in their order."""
        times, sources, rows = [], [], []
        for i, stream in enumerate(self.streams):
            if high[i] > low[i]:
                times.append((stream.middles(int(low[i]), int(high[i])) - phase.quota[i]) / phase.weights[i])
                sources.append(np.full(int(high[i] - low[i]), i))
                rows.append(np.arange(low[i], high[i]))
        if not times:
            none = np.zeros(0, np.int64)
            return np.zeros(0), none, none
        time, source, row = np.concatenate(times), np.concatenate(sources), np.concatenate(rows)
        due = np.lexsort((row, source, time))
        return time[due], source[due], row[due]

    def rows(self, position: int) -> np.ndarray:
        """(sources,) int64: how many rows of each are before a position."""
        phase = self._phase(max(position - 1, 0))  # the phase of the last of them
        wanted = position - phase.start + sum(phase.rows)
        begun, count = np.array(phase.rows), len(self.streams)
        used = np.array(phase.weights) > 0
        # The time that a position has on the average; chance moves it by about the root of an epoch's rows.
        spread = self._mean(phase) * (4 * max(stream.n for stream in self.streams) ** 0.5 + FEW)
        low = high = self._mean(phase) * (position - phase.start)
        least, most = self._bounds(phase, high)
        while least.sum() < wanted:
            high, spread = high + spread, 2 * spread
            least, most = self._bounds(phase, high)
        below, upper = self._bounds(phase, low)
        while upper.sum() > wanted and low > 0:
            low, spread = low - spread, 2 * spread
            below, upper = self._bounds(phase, low)
        if low <= 0:
            below = begun
        while (most - below).sum() > FEW + 4 * SLACK * count and low < (middle := (low + high) / 2) < high:
            lower, upper = self._bounds(phase, middle)
            if upper.sum() <= wanted:
                low, below = middle, lower
            elif lower.sum() >= wanted:
                high, most = middle, upper
            else:  # so many rows may be on the other side of the position
                near = 2 * SLACK * count
                below, most = np.maximum(lower - near, begun), np.maximum(upper + near * used, begun)
                break
        _, sources, _ = self._due(phase, below, most)
        taken = np.bincount(sources[: wanted - int(below.sum())], minlength=len(self.streams))
        return below + taken

    def _mean(self, phase: Phase) -> float:
        """Targets of a sample, on the average of a phase."""
        rates = [w * s.n / s.total for w, s in zip(phase.weights, self.streams, strict=True) if w]
        return 1 / sum(rates)

    def samples(self, start: int, stop: int) -> Samples:
        ids, epochs = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
        cuts = sorted({start, stop, *(p.start for p in self.phases if start < p.start < stop)})
        for first, last in pairwise(cuts):
            low, high = self.rows(first), self.rows(last)
            _, sources, rows = self._due(self._phase(first), low, high)
            found = np.empty(len(rows), np.int64)
            read = np.empty(len(rows), np.int64)
            for i, stream in enumerate(self.streams):
                here = sources == i
                found[here], read[here] = stream.ids(rows[here]), rows[here] // max(stream.n, 1)
            ids.append(found)
            epochs.append(read)
        return Samples(np.concatenate(ids), np.concatenate(epochs))

    # -- what there is to say of it
    # --------------------------------------------------------------------------------------

    def _taken(self, rows: np.ndarray) -> list[float]:
        return [s.targets_before(int(row)) if row else 0.0 for s, row in zip(self.streams, rows, strict=True)]

    def _planned(self, position: int) -> list[float]:
        """Targets that each source was to give before a position, of all that were given."""
        phase = self._phase(max(position - 1, 0))
        more = sum(self._taken(self.rows(position))) - sum(phase.quota)
        return [q + w * more for q, w in zip(phase.quota, phase.weights, strict=True)]

    def source_of(self, sample: int) -> str:
        """The name of a sample's source."""
        places = zip(self.names, self.streams, strict=True)
        return next(name for name, stream in places if stream.first <= sample < stream.first + stream.n)

    def describe(self, positions: int) -> list[str]:
        """What a run of so many samples takes from each source, a sentence each."""
        found = []
        for part, stream in zip(self.seen(positions), self.streams, strict=True):
            found.append(
                f"mixture: {part.name}: {part.planned:.2%} of the targets, {part.rows:,} of its {stream.n:,} sequences"
                if part.passes <= 1
                else f"mixture: {part.name}: {part.planned:.2%} of the targets, its {stream.n:,} sequences read "
                f"{part.passes:.2f} times"
            )
        for until in self.missed:
            found.append(
                f"warning: data.curriculum: the stage until {until:g} has no step: it is too short for this run"
            )
        phases = [phase for phase in self.phases if phase.start < positions]
        if len(phases) > 1:
            begins = (phase.start // self.batch + 1 for phase in phases)
            starts = (f"{b:,} ({_named(self.names, p.weights)})" for b, p in zip(begins, phases, strict=True))
            found.append(f"mixture: shares from step {'; '.join(starts)}")
        return found

    def shares(self, position: int) -> dict[str, dict[str, float]]:
        """``seen``, for records."""
        return {part.name: {k: v for k, v in asdict(part).items() if k != "name"} for part in self.seen(position)}

    def seen(self, position: int) -> list[Part]:
        """What every source gave to the samples before a position, and was to give."""
        rows, planned = self.rows(position), self._planned(position)
        taken = self._taken(rows)
        total = sum(taken) or 1.0
        return [
            Part(name, int(row), t, p / total, t / total, int(row) / max(s.n, 1))
            for name, row, t, p, s in zip(self.names, rows, taken, planned, self.streams, strict=True)
        ]


def _named(names: list[str], weights: tuple[float, ...]) -> str:
    return ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights, strict=True))
