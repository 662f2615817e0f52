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

from fastft.errors import UserError
from fastft.optim.optimizers.base import ClientOptimizer


class Unused:
    """Watches which trained parameters get a gradient."""

    def __init__(self, engine: Any, optimizer: ClientOptimizer):
        self.zero, self.optimizer = engine.optimizer, optimizer
        self.names = {p: name for name, p in engine.module.named_parameters() if p.requires_grad}
        self.params = list(self.names)
        self.sharded = bool(engine.zero_optimization_stage())
        self.device = engine.device
        self.used = used = set[int]()
        for i, param in enumerate(self.params):
            # No word of self: Python cannot free what a parameter's hook leads back to the parameter.
            param.register_post_accumulate_grad_hook(lambda _, i=i: used.add(i))

    def take(self) -> list[torch.nn.Parameter]:
        """Those without a gradient on any rank since the last call. All ranks take part.

        Raises
        ------
        UserError
            On every rank, where a sharded stage is asked for what some ranks used and others did not: ZeRO fills its
            buckets in the order of the gradients, and would have added up those of different parameters. (At stage 3
            such ranks mostly wait for each other in the forward, where they gather: the watchdog ends them.)
        """
        counts, world = torch.zeros(len(self.params), dtype=torch.int32), dist.get_world_size()
        counts[list(self.used)] = 1
        self.used.clear()
        if world > 1:
            counts = counts.to(self.device)
            dist.all_reduce(counts)
        if self.sharded and (some := ((counts > 0) & (counts < world)).nonzero().flatten().tolist()):
            names = [self.names[self.params[i]] for i in some[:3]]
            raise UserError(
                f"{len(some)} parameters got a gradient on some ranks and none on others, which ZeRO 1 to 3 cannot "
                f"reduce: {', '.join(names)}{', ...' if len(some) > 3 else ''}.",
                "Set parallel.zero: 0. The checkpoints hold nothing of this step.",
            )
        return [self.params[i] for i in (counts == 0).nonzero().flatten().tolist()]

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
