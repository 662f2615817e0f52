"""Packing plans: which document pieces share a sequence.

Best-fit decreasing (Johnson 1973; Ding et al. 2024, "Fewer truncations improve language modeling"): pieces by falling
length, each into the fullest sequence that still has room. The plan is made before training, so it depends on nothing
but the lengths.
"""

import numpy as np


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Indices of pieces per sequence, no sequence longer than capacity.

    Parameters
    ----------
    lengths : (n,) int
        Piece lengths, 1 <= length <= capacity.
    capacity : int
        Tokens per sequence.
    """
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> bins with that much room
    rooms = _Rooms(capacity + 1)
    for piece in np.argsort(-np.asarray(lengths), kind="stable"):
        length = int(lengths[piece])
        room = rooms.first_at_least(length)
        if room is None:
            index, room = len(bins), capacity
            bins.append([])
        else:
            index = by_room[room].pop()
            if not by_room[room]:
                rooms.clear(room)
        bins[index].append(int(piece))
        if left := room - length:
            by_room[left].append(index)
            rooms.set(left)
    return bins


class _Rooms:
    """A set of small integers with O(log n) "smallest member >= x": a segment tree of booleans over a flat array."""

    def __init__(self, n: int):
        self.size = 1 << (n - 1).bit_length()
        self.tree = bytearray(2 * self.size)

    def set(self, i: int) -> None:
        i += self.size
        while i and not self.tree[i]:
            self.tree[i] = 1
            i >>= 1

    def clear(self, i: int) -> None:
        i += self.size
        self.tree[i] = 0
        i >>= 1
        while i:
            self.tree[i] = self.tree[2 * i] | self.tree[2 * i + 1]
            i >>= 1

    def first_at_least(self, x: int) -> int | None:
        i = x + self.size
        if self.tree[i]:
            return x
        while i > 1:
            if not i & 1 and self.tree[i + 1]:  # climb until a right sibling holds a member, then go down its left edge
                i += 1
                while i < self.size:
                    i = 2 * i if self.tree[2 * i] else 2 * i + 1
                return i - self.size
            i >>= 1
        return None
