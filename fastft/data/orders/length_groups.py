"""Samples of about one length beside each other, so that batches hold little padding."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
from pydantic import Field

from fastft import rooms
from fastft.config import Order as OrderSettings
from fastft.data import order
from fastft.data.orders.base import Order, Samples
from fastft.data.split import Split


class LengthGroupsSettings(OrderSettings):
    """How many samples are sorted together, and how many of them stay together."""

    window: int = Field(1600, ge=2, description="Samples that are drawn at random and then sorted by length.")
    block: int | None = Field(
        None,
        ge=1,
        description="Neighbors that stay together, blocks coming in a random order; default: the samples of a step.",
    )


@rooms.ORDERS.register("length_groups")
class LengthGroups(Order):
    """Every sample once an epoch. Those of a window, drawn at random, are sorted by length and cut into blocks, which
    come in a random order, as the samples in each do: a batch holds texts of about one length, but successive ones any.

    transformers' group_by_length sorts windows of 50 batches in the same way and leaves the blocks sorted: its learning
    rate then meets long texts first and short ones last, over and over.
    """

    Settings = LengthGroupsSettings
    KEPT = 2  # a step may end in one window and begin in another

    def __init__(self, settings: LengthGroupsSettings, split: Split, seed: int, batch: int):
        super().__init__(settings, split, seed, batch)
        self.window, self.block = settings.window, settings.block or batch
        self.windows = OrderedDict[tuple[int, int], np.ndarray]()

    def samples(self, start: int, stop: int) -> Samples:
        n = len(self.split)
        positions = np.arange(start, stop)
        ids = np.empty(len(positions), np.int64)
        place = positions % n
        window = min(self.window, n)
        groups = np.stack([positions // n, place // window], axis=1)
        for epoch, number in np.unique(groups, axis=0).tolist():
            here = (groups == (epoch, number)).all(1)
            first = number * window
            ids[here] = self._window(epoch, first, min(first + window, n))[place[here] - first]
        return Samples(ids, positions // n)

    def _window(self, epoch: int, first: int, last: int) -> np.ndarray:
        """The samples of an epoch's positions [first, last), in their order. Steps take a few of them each: kept."""
        if (epoch, first) not in self.windows:
            self.windows[epoch, first] = self._made(epoch, first, last)
            while len(self.windows) > self.KEPT:
                self.windows.popitem(last=False)
        return self.windows[epoch, first]

    def _made(self, epoch: int, first: int, last: int) -> np.ndarray:
        drawn = order.permute(len(self.split), self.seed, epoch, np.arange(first, last))
        grouped = drawn[by_size(self.split.sizes[drawn], self.block)]
        cuts = [grouped[at : at + self.block] for at in range(0, len(grouped), self.block)]  # the last may be a part
        cuts = [
            cut[order.permute(len(cut), self.seed + first + at, epoch, np.arange(len(cut)))]
            for at, cut in enumerate(cuts)
        ]
        return np.concatenate(
            [cuts[i] for i in order.permute(len(cuts), self.seed + first + 1, epoch, np.arange(len(cuts)))]
        )


def by_size(sizes: np.ndarray, block: int) -> np.ndarray:
    """An order in which blocks of neighbors hold little padding.

    Parameters
    ----------
    sizes : (n,) or (n, parts) int
        Lengths in tokens; of parts that are padded each by itself, as source and target are.
    block : int
        Samples in a block.

    Returns
    -------
    (n,) int64

    Notes
    -----
    One length is sorted. Of several, each is tried as the first: sorted by it, cut into 1, 2, 4, ... strips of whole
    blocks, and every strip sorted by the other parts' sum, up and down in turns, so that neighbors across a cut are
    alike. The order with the fewest padded tokens is taken.
    """
    if sizes.ndim == 1 or sizes.shape[1] == 1:
        return np.argsort(sizes.reshape(-1), kind="stable")
    blocks = -(-len(sizes) // block)
    counts = sorted({min(1 << power, blocks) for power in range(blocks.bit_length() + 1)})
    orders = [_strips(sizes, part, -(-blocks // n) * block) for part in range(sizes.shape[1]) for n in counts]
    return min(orders, key=lambda order: _padded(sizes[order], block))  # the first of equal ones


def _strips(sizes: np.ndarray, part: int, strip: int) -> np.ndarray:
    first, rest = sizes[:, part], sizes.sum(1) - sizes[:, part]
    place = np.empty(len(sizes), np.int64)
    place[np.lexsort((rest, first))] = np.arange(len(sizes)) // strip
    return np.lexsort((first, np.where(place % 2, -rest, rest), place))


def _padded(sizes: np.ndarray, block: int) -> int:
    """Tokens in blocks of these sizes, every part as wide as its longest."""
    starts = np.arange(0, len(sizes), block)
    rows = np.diff(np.append(starts, len(sizes)))
    return int((np.maximum.reduceat(sizes, starts).sum(1) * rows).sum())
