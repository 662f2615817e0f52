"""What a sample order is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fastft.config import Order as OrderSettings
from fastft.data.split import Split


@dataclass(frozen=True)
class Samples:
    """The samples of a step.

    Attributes
    ----------
    ids : (n,) int64
        Rows of the training split.
    epochs : (n,) int64
        How often each was taken before: what is drawn at random for a sample (masks, augmentation) is a function of the
        run's seed, this and the id.
    """

    ids: np.ndarray
    epochs: np.ndarray


class Order(ABC):
    """A pure function of the position, so that nothing has to be saved and any step can be looked up.

    Positions count the samples that a run takes, from 0; a step takes a range of them.

    Attributes
    ----------
    rows_per_epoch : int
        Positions of an epoch of the run.
    limit : int or None
        Positions that there are at most; None: no end.
    """

    Settings: ClassVar[type[OrderSettings]] = OrderSettings

    def __init__(self, settings: OrderSettings, split: Split, seed: int, batch: int):
        """``batch``: samples of a step."""
        self.settings, self.split, self.seed, self.batch = settings, split, seed, batch
        self.limit: int | None = None

    @property
    def rows_per_epoch(self) -> int:
        return len(self.split)

    def describe(self, positions: int) -> list[str]:
        """What to know of a run of so many samples, a sentence each."""
        return []

    def shares(self, position: int) -> dict[str, dict[str, float]]:
        """Of a mixture: what each source gave to the samples before a position, see ``mixture.Part``."""
        return {}

    @abstractmethod
    def samples(self, start: int, stop: int) -> Samples:
        """Those at the positions [start, stop) of one step."""
