"""What this machine can do at best: a copy in memory, a matrix product, and a sum over the ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastft.ranks import Ranks

REPEATS = 7


@dataclass(frozen=True)
class Ceilings:
    """Of one rank, all ranks working at the same time.

    Attributes
    ----------
    copy : float
        Bytes read and written per second by a copy far larger than the caches.
    matmul : float
        FLOP/s of the product of two large square matrices, in the model's dtype.
    all_reduce : float or None
        Bytes of gradients per second; None: one rank.
    """

    copy: float
    matmul: float
    all_reduce: float | None


def ceilings(ranks: Ranks, dtype: torch.dtype) -> Ceilings:
    """Measured now; all ranks together. Takes about two seconds on a CPU."""
    device = ranks.device
    cuda = device.type == "cuda"
    source = torch.randn(2**28 if cuda else 2**25, device=device)  # ones would be multiplied faster
    target = torch.empty_like(source)
    size = 8192 if cuda else 1536
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copied = _best(lambda: target.copy_(source), ranks)
    multiplied = _best(lambda: a @ b, ranks)
    reduced = None if ranks.alone else _best(lambda: dist.all_reduce(source), ranks)
    return Ceilings(
        2 * source.nbytes / copied,
        2 * size**3 / multiplied,
        None if reduced is None else source.nbytes / reduced,
    )


def _best(call: Callable[[], object], ranks: Ranks) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    found = []
    for _ in range(REPEATS + 1):
        ranks.barrier()
        start = time.perf_counter()
        call()
        _settled(ranks)
        found.append(time.perf_counter() - start)
    return min(found[1:])


def _settled(ranks: Ranks) -> None:
    if ranks.device.type == "cuda":
        torch.cuda.synchronize()
