"""Packing plans: which document pieces share a sequence.

Best-fit decreasing (Johnson 1973; Ding et al. 2024, "Fewer truncations improve language modeling"): pieces by falling
length, each into the fullest sequence that still has room. The plan is made before training, so it depends on nothing
but the lengths.
"""

import numpy as np


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Pieces in the order of their sequences, and where each sequence begins among them.

    Pieces of one length are placed together: the cost grows with the number of lengths and of sequences' rooms, and
    not with the number of pieces.

    Parameters
    ----------
    lengths : (n,) int
        Piece lengths, 1 <= length <= capacity.
    capacity : int
        Tokens per sequence.

    Returns
    -------
    pieces : (n,) int64
        Indices of pieces, sequence after sequence.
    offsets : (sequences + 1,) int64
    """
    lengths = np.asarray(lengths)
    assert len(lengths) == 0 or (lengths.min() >= 1 and lengths.max() <= capacity)
    shortfall = capacity - lengths  # of small integers NumPy sorts by digits, three times as fast
    order = np.argsort(shortfall.astype(np.uint16) if capacity < 1 << 16 else shortfall, kind="stable")
    bin_of = np.empty(len(order), np.int64)
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> bins with that much room
    rooms = _Rooms(capacity + 1)
    made = at = 0
    for length, count in zip(*_falling(lengths), strict=True):
        end = at + count
        while at < end:
            room = rooms.first_at_least(length)
            each = (capacity if room is None else room) // length  # what a bin takes before the next one gets any
            wanted = -(-(end - at) // each)
            if room is None:
                room, taken = capacity, list(range(made, made + wanted))
                made += wanted
            else:
                taken = by_room[room][: -wanted - 1 : -1]
                del by_room[room][-wanted:]
                if not by_room[room]:
                    rooms.clear(room)
            placed = min(len(taken) * each, end - at)
            bin_of[at : at + placed] = np.repeat(taken, each)[:placed]
            at += placed
            last = placed - (len(taken) - 1) * each  # pieces in the last of them
            for bins, left in ((taken[:-1], room - each * length), (taken[-1:], room - last * length)):
                if left and bins:
                    by_room[left] += bins
                    rooms.set(left)
    pieces = order[np.argsort(bin_of, kind="stable")]
    return pieces, np.concatenate([[0], np.cumsum(np.bincount(bin_of, minlength=made))]).astype(np.int64)


def _falling(lengths: np.ndarray) -> tuple[list[int], list[int]]:
    """Distinct lengths, the longest first, and how many pieces have each."""
    values, counts = np.unique(lengths, return_counts=True)
    return values[::-1].tolist(), counts[::-1].tolist()


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """``best_fit`` as lists: indices of pieces per sequence, no sequence longer than capacity."""
    pieces, offsets = best_fit(lengths, capacity)
    return [part.tolist() for part in np.split(pieces, offsets[1:-1])] if len(pieces) else []


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
