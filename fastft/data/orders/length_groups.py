"""Samples of about one length beside each other, so that batches hold little padding."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config import Order as OrderSettings
from fastft.data import order
from fastft.data.orders.base import Order, Samples


class LengthGroupsSettings(OrderSettings):
    """How many samples are sorted together, and how many of them stay together."""

    window: int = Field(1600, ge=2, description="Samples that are drawn at random and then sorted by length.")
    block: int = Field(
        32, ge=1, description="Neighbors that stay together, blocks coming in a random order: set it to batch.size."
    )


@rooms.ORDERS.register("length_groups")
class LengthGroups(Order):
    """Every sample once an epoch. Those of a window, drawn at random, are sorted by length and cut into blocks, which
    come in a random order, as the samples in each do: a batch holds texts of about one length, but successive ones any.

    transformers' group_by_length sorts windows of 50 batches in the same way and leaves the blocks sorted: its learning
    rate then meets long texts first and short ones last, over and over.
    """

    Settings = LengthGroupsSettings

    def samples(self, start: int, stop: int) -> Samples:
        n = len(self.split)
        positions = np.arange(start, stop)
        ids = np.empty(len(positions), np.int64)
        place = positions % n
        window = np.minimum(self.settings.window, n)  # type: ignore[attr-defined]
        groups = np.stack([positions // n, place // window], axis=1)
        for epoch, number in np.unique(groups, axis=0).tolist():
            here = (groups == (epoch, number)).all(1)
            first = number * window
            ids[here] = self._window(epoch, first, min(first + window, n))[place[here] - first]
        return Samples(ids, positions // n)

    def _window(self, epoch: int, first: int, last: int) -> np.ndarray:
        """The samples of an epoch's positions [first, last), in their order."""
        n, block = len(self.split), self.settings.block  # type: ignore[attr-defined]
        drawn = order.permute(n, self.seed, epoch, np.arange(first, last))
        by_length = drawn[np.argsort(self.split.lengths[drawn], kind="stable")]
        cuts = [by_length[at : at + block] for at in range(0, len(by_length), block)]  # the last may be a part of one
        cuts = [
            cut[order.permute(len(cut), self.seed + first + at, epoch, np.arange(len(cut)))]
            for at, cut in enumerate(cuts)
        ]
        return np.concatenate(
            [cuts[i] for i in order.permute(len(cuts), self.seed + first + 1, epoch, np.arange(len(cuts)))]
        )
