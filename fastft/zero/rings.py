"""DeepSpeed's collectives on gloo, in place.

torch's gloo all-gathers into a copy of the result, and reduce-scatters by an all-reduce of a clone: each takes the
whole tensor a second time, and the second sends twice what is needed. Here parts go round a ring of ranks (Patarasuk
and Yuan 2009, https://doi.org/10.1016/j.jpdc.2008.09.002), straight into the result, or through two small buffers.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor

SEGMENT = 1 << 20  # elements that are received at a time, to be added


def install() -> None:
    """Have DeepSpeed use them. For a process whose default group is gloo's."""
    from deepspeed.comm import comm

    backend: Any = comm.cdb
    plain = backend.reduce_scatter_tensor

    def reduced(output_tensor: Tensor, input_tensor: Tensor, op: Any = comm.ReduceOp.SUM, **how: Any) -> Any:
        do = reduce_scatter if op == comm.ReduceOp.SUM else partial(plain, op=op)
        return do(output_tensor, input_tensor, **how)

    backend.all_gather_into_tensor = all_gather
    backend.reduce_scatter_tensor = reduced


def all_gather(output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """Parts of all ranks, one behind the other.

    Parameters
    ----------
    output_tensor : (ranks * n,) contiguous
    input_tensor : (n,)
        This rank's part; may lie in its place in the output.
    """
    rank, world, before, after = _neighbours(group)
    parts = output_tensor.view(world, -1)
    if parts[rank].data_ptr() != input_tensor.data_ptr():
        parts[rank].copy_(input_tensor.view(-1))
    for step in range(world - 1):
        sent: Any = dist.isend(parts[(rank - step) % world], after, group)
        dist.recv(parts[(rank - step - 1) % world], before, group)
        sent.wait()
    return DONE if async_op else None


def reduce_scatter(output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
    """The sum over the ranks of this rank's part. What is in the input is lost.

    Parameters
    ----------
    output_tensor : (n,)
        May be this rank's part of the input.
    input_tensor : (ranks * n,) contiguous
    """
    rank, world, before, after = _neighbours(group)
    parts = input_tensor.view(world, -1)
    buffers = parts.new_empty(2, min(SEGMENT, parts.shape[1]))
    for step in range(world - 1):
        mine, sums = parts[(rank - step - 1) % world], parts[(rank - step - 2) % world]
        sent: Any = [dist.isend(segment, after, group) for segment in mine.split(SEGMENT)]
        segments = sums.split(SEGMENT)
        places = [buffers[i % 2][: len(segment)] for i, segment in enumerate(segments)]
        coming: Any = dist.irecv(places[0], before, group)
        for i, segment in enumerate(segments):  # added while the next one is on its way
            coming.wait()
            if i + 1 < len(segments):
                coming = dist.irecv(places[i + 1], before, group)
            segment += places[i]
        for work in sent:
            work.wait()
    if output_tensor.data_ptr() != parts[rank].data_ptr():
        output_tensor.copy_(parts[rank].view_as(output_tensor))
    return DONE if async_op else None


def _neighbours(group: Any) -> tuple[int, int, int, int]:
    """Of this rank: its place in the group, how many there are, and the ranks before and after it in the ring."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    return rank, world, ranks[(rank - 1) % world], ranks[(rank + 1) % world]


DONE = SimpleNamespace(wait=lambda: True, is_completed=lambda: True)  # of what was done at once
