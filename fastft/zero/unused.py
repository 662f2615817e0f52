"""Parameters that took no part in a step stay as they are, at every ZeRO stage.

torch's optimizers pass over a parameter without a gradient. DeepSpeed gives it one of zeros (it reduces and cuts
gradients as one flat tensor), so that weight decay and old momentum would move it: XLNet's ``mask_emb``, a pooler that
the head does not read, an expert that got no token. Here is remembered which parameters got a gradient; those that got
none on any rank are put back after the step, master and optimizer state included.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from fastft.optim.optimizers.base import ClientOptimizer


class Unused:
    """Watches which trained parameters get a gradient."""

    def __init__(self, engine: Any, optimizer: ClientOptimizer):
        self.zero, self.optimizer = engine.optimizer, optimizer
        self.params = [p for p in engine.module.parameters() if p.requires_grad]
        self.device = engine.device
        self.used: set[int] = set()
        for i, param in enumerate(self.params):
            param.register_post_accumulate_grad_hook(lambda _, i=i: self.used.add(i))

    def take(self) -> list[torch.nn.Parameter]:
        """Those without a gradient on any rank since the last call. All ranks take part."""
        flags = torch.zeros(len(self.params), dtype=torch.uint8)
        flags[list(self.used)] = 1
        self.used.clear()
        if dist.get_world_size() > 1:
            flags = flags.to(self.device)
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [self.params[i] for i in (flags == 0).nonzero().flatten().tolist()]

    @contextmanager
    def kept(self, params: list[torch.nn.Parameter]) -> Iterator[None]:
        """While inside, an optimizer step does not change these."""
        before = [(t, t.clone()) for t in self._tensors(params)]
        yield
        for tensor, value in before:
            tensor.copy_(value)

    def _tensors(self, params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
        """What this rank holds of them: weights, master, optimizer state."""
        if not params:
            return []
        wanted, found = set(params), [p.data for p in params if p.numel()]
        found += [p.ds_tensor.data for p in params if hasattr(p, "ds_tensor")]
        for param, flat, start, size in shards(self.zero):
            if param in wanted:
                # Not the blockwise int8 state: its scales belong to neighbors too.
                state = self.optimizer.state.get(flat, {}).values()
                whole = [t for t in state if torch.is_tensor(t) and t.numel() == flat.numel() and t.is_floating_point()]
                found += [t.detach().view(-1)[start : start + size] for t in (flat, *whole)]
        return found


def shards(zero: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int, int]]:
    """Where a DeepSpeed optimizer keeps this rank's part of every parameter: the parameter, the flat float32 tensor
    that is updated, and start and length in it.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # stage 3 cuts every parameter
        for flat, params in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
            start = 0
            for param in params:
                size = param.partition_numel()
                if start + size <= flat.numel():  # elsewhere (NVMe) it is not here
                    yield param, flat, start, size
                start += size
        return
    groups = getattr(zero, "bit16_groups", None) or getattr(zero, "bf16_groups", [])
    flats = getattr(zero, "single_partition_of_fp32_groups", None) or getattr(zero, "fp32_groups_flat_partition", [])
    for flat, params in zip(flats, groups, strict=True):  # stages 1 and 2, and bf16 without ZeRO, cut a group
        for param in params:
            if param._hp_mapping is not None:
                place = param._hp_mapping.get_hp_fragment_address()
                yield param, flat, place.start, place.numel
