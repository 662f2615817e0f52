"""Every sample once an epoch, in a random order of its own each time."""

import numpy as np

from fastft import rooms
from fastft.data import order
from fastft.data.orders.base import Order, Samples


@rooms.ORDERS.register("permutation")
class Permutation(Order):
    """Every sample once an epoch, in a new random order each time: a keyed permutation, see ``fastft.data.order``."""

    def samples(self, start: int, stop: int) -> Samples:
        n = len(self.split)
        return Samples(order.sample_ids(n, self.seed, start, stop), np.arange(start, stop) // n)
