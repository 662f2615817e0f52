"""The documents that were seen: a set of 16-byte hashes that takes 16 bytes each, and a little while it grows."""

from __future__ import annotations

import numpy as np

KIND = np.dtype("S16")  # compared without the zeros at its end, which all hashes are cut alike by


class Sorted:
    """Sorted arrays of falling size; two of about one size become one."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []

    def add(self, part: np.ndarray) -> None:
        """``part``: sorted."""
        if not len(part):
            return
        while self.parts and len(self.parts[-1]) <= 4 * len(part):
            part = np.sort(np.concatenate([self.parts.pop(), part]), kind="stable")
        self.parts.append(part)


class Seen:
    """Hashes of texts."""

    def __init__(self) -> None:
        self.known = Sorted()

    def new(self, ids: list[bytes]) -> np.ndarray:
        """For each hash whether it is met for the first time, among these and all that were added, (n,) bool."""
        found = np.frombuffer(b"".join(ids), KIND)
        values, first = np.unique(found, return_index=True)
        known = np.zeros(len(values), bool)
        for part in self.known.parts:
            at = np.minimum(np.searchsorted(part, values), len(part) - 1)
            known |= part[at] == values
        fresh = np.zeros(len(ids), bool)
        fresh[first[~known]] = True
        return fresh

    def add(self, ids: np.ndarray) -> None:
        """(n, 16) uint8: hashes that are new."""
        self.known.add(np.sort(np.ascontiguousarray(ids).view(KIND).ravel()))
