"""Sample order as a pure function of (seed, epoch, position).

A keyed permutation of [0, n): a balanced Feistel network over the next even power of two, with cycle walking back into
the range (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). No table, no state: position 10^12 costs
as much as position 0, and it does not matter which rank or which restart asks.
"""

import hashlib

import numpy as np

ROUNDS = 6  # four suffice for a pseudo-random permutation (Luby and Rackoff 1988); six as a margin on tiny domains
_MIX = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # splitmix64


def permute(n: int, seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """Where the permutation of [0, n) for (seed, epoch) sends positions.

    Parameters
    ----------
    n : int
        Size of the data set, 1 <= n < 2^62.
    positions : (k,) int64
        Positions in [0, n).

    Returns
    -------
    (k,) int64
    """
    positions = np.asarray(positions, dtype=np.int64)
    assert n >= 1 and (positions.size == 0 or (positions.min() >= 0 and positions.max() < n))
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    keys = _keys(seed, epoch)
    x = _feistel(positions.astype(np.uint64), half, keys)
    while (outside := x >= n).any():  # the domain is < 4n, so 4 walks are expected at worst
        x[outside] = _feistel(x[outside], half, keys)
    return x.astype(np.int64)


def sample_ids(n: int, seed: int, start: int, stop: int) -> np.ndarray:
    """Sample ids at absolute positions [start, stop), where epoch e covers positions [e*n, (e+1)*n)."""
    positions = np.arange(start, stop, dtype=np.int64)
    ids = np.empty_like(positions)
    for epoch in range(start // n, (stop + n - 1) // n):
        here = positions // n == epoch
        ids[here] = permute(n, seed, epoch, positions[here] - epoch * n)
    return ids


def _keys(seed: int, epoch: int) -> np.ndarray:
    digest = hashlib.blake2b(f"fastft.order:{seed}:{epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8")


def _feistel(x: np.ndarray, half: int, keys: np.ndarray) -> np.ndarray:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = x >> shift, x & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + _MIX[0]
        x = (x ^ (x >> np.uint64(30))) * _MIX[1]
        x = (x ^ (x >> np.uint64(27))) * _MIX[2]
    return x ^ (x >> np.uint64(31))
