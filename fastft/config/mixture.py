"""How training sources are mixed: what `data.train` and `data.curriculum` say together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastft.config.sources import Stage, TrainSource


@dataclass(frozen=True)
class Share:
    """One source of a mixture; entries of ``data.train`` with one name, as those of a pattern, are one.

    Attributes
    ----------
    first, last : int
        The entries [first, last) of ``data.train``.
    weight : float
        Share of the targets that are learned from, of the sum of all weights; 0 where ``by_epochs``.
    epochs : float or None
        How often it is read at most in the run; ``by_epochs``: in each epoch of the run.
    """

    name: str
    first: int
    last: int
    weight: float
    epochs: float | None


@dataclass(frozen=True)
class Shares:
    """The sources of a mixture, in the order of ``data.train``.

    Attributes
    ----------
    by_epochs : bool
        No weights are given: every source is read ``epochs`` times (once where it says nothing) an epoch of the run.
    stages : list of (until, weights)
        Weights by source that hold before ``until``, a step or a fraction of all steps.
    """

    parts: list[Share]
    by_epochs: bool
    stages: list[tuple[int | float, list[float]]]


def shares_of(sources: Sequence[TrainSource], curriculum: Sequence[Stage]) -> Shares | None:
    """The mixture that is asked for; None: all sources are read as one. Raises ValueError for what contradicts."""
    weighted = [source for source in sources if source.weight is not None]
    if not weighted and not any(source.epochs is not None for source in sources):
        if curriculum:
            raise ValueError("data.curriculum: no source of data.train has a weight; give each one")
        return None
    parts = _parts(sources)
    if weighted and len(weighted) < len(sources):
        without = ", ".join(source.label for source in sources if source.weight is None)
        raise ValueError(f"data.train: some sources have a weight, these have none: {without}")
    if weighted:
        _check_sum("data.train", [part.weight for part in parts])
    if curriculum and not weighted:
        raise ValueError("data.curriculum: takes the place of weights: give each source of data.train one, not epochs")
    return Shares(parts, not weighted, _stages(curriculum, [part.name for part in parts]))


def _check_sum(where: str, weights: list[float]) -> None:
    if not (total := sum(weights)):
        raise ValueError(f"{where}: all weights are 0")
    if not math.isfinite(total):
        raise ValueError(f"{where}: the weights are too large to be added: shares count, so 0.8 and 0.2 will do")


def _parts(sources: Sequence[TrainSource]) -> list[Share]:
    parts: list[Share] = []
    for i, source in enumerate(sources):
        known = {part.name: part for part in parts}
        if (same := known.get(source.label)) is None:
            parts.append(Share(source.label, i, i + 1, source.weight or 0.0, source.epochs))
            continue
        if source.name is None or source.dataset or not all(s.name for s in sources[same.first : same.last]):
            raise ValueError(f"data.train: two sources are called {source.label!r}: give each a name of its own")
        if (same.weight, same.epochs) != (source.weight or 0.0, source.epochs):
            raise ValueError(f"data.train: {source.label!r} is one source of the mixture, with two weights or epochs")
        if same.last != i:
            raise ValueError(f"data.train: {source.label!r} is one source of the mixture: list its files together")
        parts[-1] = Share(same.name, same.first, i + 1, same.weight, same.epochs)
    return parts


def _stages(curriculum: Sequence[Stage], names: list[str]) -> list[tuple[int | float, list[float]]]:
    ends = [stage.until for stage in curriculum]
    if len({type(end) for end in ends}) > 1:
        raise ValueError("data.curriculum: until: give all in steps (500), or all as fractions of the steps (0.5)")
    if ends != sorted(set(ends)):
        raise ValueError(f"data.curriculum: until: {', '.join(map(str, ends))} do not rise")
    for stage in curriculum:
        if unknown := set(stage.weights) - set(names):
            raise ValueError(
                f"data.curriculum: no source is called {min(unknown)!r}; data.train has {', '.join(names)}"
            )
        _check_sum(f"data.curriculum: until {stage.until}", list(stage.weights.values()))
    return [(stage.until, [stage.weights.get(name, 0.0) for name in names]) for stage in curriculum]
