"""How the sequences of one optimizer step are dealt to micro-steps and ranks.

The gradient of a step does not depend on the deal (the loss is normalised by the whole step's target count), so it is
free to choose the one that computes least padding: sorted by length, neighbours share a forward.
"""

from itertools import pairwise

import numpy as np

# A forward-backward has a fixed cost (kernel launches, the engine's hooks) that a split must win back; in tokens,
# measured on a 6-layer BERT on 2 cores. A GPU pays the same order: small kernels there are launch-bound below a few
# hundred tokens.
OVERHEAD_TOKENS = 64

Plan = list[list[np.ndarray]]  # [micro-step][rank] -> sample ids, possibly empty


def fixed(ids: np.ndarray, ranks: int, micro: int) -> Plan:
    """In the order given, ``micro`` sequences per rank and micro-step; only the last ones may be short."""
    per_step = ranks * micro
    return [[ids[s + r * micro : s + (r + 1) * micro] for r in range(ranks)] for s in range(0, len(ids), per_step)]


def by_length(ids: np.ndarray, lengths: np.ndarray, ranks: int, micro_tokens: int) -> Plan:
    """Sorted by length, then cut into micro-steps so that padding plus OVERHEAD_TOKENS per micro-step is least.

    Parameters
    ----------
    ids : (n,) int64
        Samples of the whole step.
    lengths : (n,) int
        Their lengths in tokens.
    micro_tokens : int
        Most padded tokens in one rank's forward (a single longer sequence still gets one of its own).

    Notes
    -----
    Every rank takes part in every micro-step (ZeRO's collectives need it). The cut is a shortest path over positions in
    the sorted order: cost of a micro-step = longest length * sequences on the fullest rank + OVERHEAD_TOKENS.
    """
    order = np.argsort(lengths, kind="stable")
    sorted_lengths = lengths[order]
    n = len(ids)
    best = np.full(n + 1, np.inf)
    best[0], back = 0, np.zeros(n + 1, dtype=np.int64)
    for end in range(1, n + 1):
        longest = int(sorted_lengths[end - 1])
        most = max(1, micro_tokens // longest) * ranks  # sequences that fit beside the longest
        starts = np.arange(max(0, end - most), end)
        per_rank = -(-(end - starts) // ranks)
        costs = best[starts] + longest * per_rank + OVERHEAD_TOKENS
        pick = int(np.argmin(costs))
        best[end], back[end] = costs[pick], starts[pick]
    cuts = [n]
    while cuts[-1] > 0:
        cuts.append(int(back[cuts[-1]]))
    cuts.reverse()
    return [np.array_split(ids[order[a:b]], ranks) for a, b in pairwise(cuts)]
