"""How the sequences of one optimizer step are dealt to micro-steps and ranks.

The gradient of a step does not depend on the deal (the loss is normalised by the whole step's target count), so it is
free to choose the one that is computed fastest.
"""

from itertools import pairwise

import numpy as np

# A forward-backward has a fixed cost (kernel launches, the engine's hooks) that a split must win back. In tokens: on a
# CPU measured on a 6-layer BERT on 2 cores, and at least that; on a GPU the host's 10 to 100 ms for 12 to 22 layers, at
# 80,000 (1.1 B) to 600,000 (110 M) tokens/s.
OVERHEAD_TOKENS = {"cpu": 64, "cuda": 4096}
# On a CPU the fixed cost goes by the number of modules, a token's by the number of weights. Marian of 64 modules and
# 3.9 M weights: 18 ms and 0.11 ms, 165 tokens.
MODULE_WEIGHTS = 10_000_000
# Without padding there is nothing to win; on a CPU small parts stay in the caches.
LARGEST = {"cpu": 2048, "cuda": 1 << 62}

Plan = list[list[np.ndarray]]  # [micro-step][rank] -> sample ids, possibly empty


def fixed(ids: np.ndarray, ranks: int, micro: int) -> Plan:
    """In the order given, ``micro`` sequences per rank and micro-step; only the last ones may be short."""
    per_step = ranks * micro
    return [[ids[s + r * micro : s + (r + 1) * micro] for r in range(ranks)] for s in range(0, len(ids), per_step)]


def overhead(modules: int, weights: int, device: str) -> int:
    """What a micro-step costs beside its tokens, in tokens.

    Parameters
    ----------
    modules, weights : int
        Modules with weights of their own, and those weights, embeddings apart.
    """
    if device != "cpu":
        return OVERHEAD_TOKENS[device]
    return max(OVERHEAD_TOKENS["cpu"], MODULE_WEIGHTS * modules // max(weights, 1))


def auto(
    ids: np.ndarray,
    lengths: np.ndarray,
    ranks: int,
    micro_tokens: int,
    padded: bool,
    device: str,
    overhead: int,
) -> Plan:
    """The deal that computes fastest.

    Parameters
    ----------
    ids, lengths, micro_tokens
        As ``by_length`` has them.
    padded : bool
        Whether every sequence of a forward is computed at the longest one's length.
    device : str
        "cpu" or "cuda".
    overhead : int
        Of a micro-step, in tokens.
    """
    if padded:
        return by_length(ids, lengths, ranks, micro_tokens, overhead)
    return by_tokens(ids, lengths, ranks, min(micro_tokens, LARGEST[device]))


def by_tokens(ids: np.ndarray, lengths: np.ndarray, ranks: int, micro_tokens: int) -> Plan:
    """Sorted by length, then cut into as few micro-steps as hold the sequences without padding, about as many tokens in
    each and on each rank.

    ``micro_tokens``: most tokens in one rank's forward; a single longer sequence still gets one of its own.
    """
    order = np.argsort(lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    middles = ends - lengths[order] / 2
    for micros in range(max(1, -(-int(ends[-1]) // (micro_tokens * ranks))), len(ids) + 1):
        share = ends[-1] / (micros * ranks)
        cuts = np.searchsorted(middles, share * np.arange(1, micros * ranks))
        parts = np.split(order, cuts)
        if all(len(part) < 2 or lengths[part].sum() <= micro_tokens for part in parts):
            break
    else:  # one each
        parts = np.array_split(order, -(-len(ids) // ranks) * ranks)
    return [[ids[part] for part in parts[at : at + ranks]] for at in range(0, len(parts), ranks)]


def by_length(
    ids: np.ndarray, lengths: np.ndarray, ranks: int, micro_tokens: int, overhead: int = OVERHEAD_TOKENS["cpu"]
) -> Plan:
    """Sorted by length, then cut into micro-steps so that padding plus ``overhead`` per micro-step is least.

    Parameters
    ----------
    ids : (n,) int64
        Samples of the whole step.
    lengths : (n,) or (n, parts) int
        Their lengths in tokens; of parts that are padded each by itself, as source and target are.
    micro_tokens : int
        Most padded tokens in one rank's forward (a single longer sequence still gets one of its own).
    overhead : int
        What a micro-step costs beside its tokens, in tokens.

    Notes
    -----
    Every rank takes part in every micro-step (ZeRO's collectives need it). The cut is a shortest path over positions in
    the sorted order: cost of a micro-step = longest length * sequences on the fullest rank + overhead. With several
    parts the order is that of their sum, then of the parts, and the longest length the sum of every part's.
    """
    parts = lengths.reshape(len(ids), -1)
    order = np.lexsort((*parts.T[::-1], parts.sum(1)))
    parts = parts[order]
    n = len(ids)
    best = np.full(n + 1, np.inf)
    best[0], back = 0, np.zeros(n + 1, dtype=np.int64)
    for end in range(1, n + 1):
        longest = int(parts[end - 1].sum())
        most = max(1, micro_tokens // longest) * ranks  # sequences that fit beside the longest
        starts = np.arange(max(0, end - most), end)
        per_rank = -(-(end - starts) // ranks)
        width = longest if parts.shape[1] == 1 else _widths(parts[starts])
        costs = best[starts] + width * per_rank + overhead
        costs[(width * per_rank > micro_tokens) & (per_rank > 1)] = np.inf
        pick = int(np.argmin(costs))
        best[end], back[end] = costs[pick], starts[pick]
    cuts = [n]
    while cuts[-1] > 0:
        cuts.append(int(back[cuts[-1]]))
    cuts.reverse()
    return [np.array_split(ids[order[a:b]], ranks) for a, b in pairwise(cuts)]


def _widths(parts: np.ndarray) -> np.ndarray:
    """(n,): the padded length of the sequences from each one on to the last: every part's longest, summed."""
    return np.maximum.accumulate(parts[::-1], axis=0)[::-1].sum(1)
