"""A checkpoint into a DeepSpeed engine, also one that other ranks or another ZeRO stage wrote."""

from __future__ import annotations

from typing import Any

import torch

from fastft.errors import UserError
from fastft.optim.optimizers.base import OptimizerSpec
from fastft.ranks import Ranks
from fastft.zero.on_disk import on_disk, state_onto_disk
from fastft.zero.stored import MASTER, Stored


def reshards(manifest: dict, stage: int, ranks: Ranks, spec: OptimizerSpec) -> bool:
    """Whether a checkpoint was written by another number of ranks or another ZeRO stage, so that its state is to be
    cut anew.

    Raises
    ------
    UserError
        Between stage 0, whose state is whole, and the others; for an optimizer whose state cannot be cut.
    """
    before = manifest["zero"]
    if before == stage and (manifest["world_size"] == ranks.world or stage == 0):
        return False
    if before != stage and 0 in (before, stage):
        raise UserError(
            f"The checkpoint was written with parallel.zero = {before}, this run has {stage}.",
            f"Resume with parallel.zero={before}, or start a new run from the exported model (`fastft export`).",
        )
    if not spec.elementwise:
        raise UserError(
            f"The checkpoint was written by {manifest['world_size']} ranks at parallel.zero = {before}, this run has "
            f"{ranks.world} and {stage}: the state of optim.name: {spec.config.optim.name} cannot be cut anew.",
            "Resume with the ranks and the stage that it was written with, or start a new run from the exported model.",
        )
    return True


def restore(engine: Any, stored: Stored, partial: bool) -> None:
    """Weights, optimizer state and counters of a checkpoint into an engine, all ranks together.

    ``partial``: the checkpoint holds an adapter alone. As DeepSpeed's ``load_checkpoint``, but for where the state
    comes from.
    """
    zero, stage, rank = engine.optimizer, engine.zero_optimization_stage(), torch.distributed.get_rank()
    world = torch.distributed.get_world_size()
    same = (stored.stage, stored.world) == (stage, world)
    if stage == 3:
        zero.checkpoint_event_prologue()  # every parameter is in shards again
    module = _module(engine, stored, rank, same)
    engine.load_module_state_dict(checkpoint=module, strict=not partial)
    engine.global_steps, engine.skipped_steps = module["global_steps"], module["skipped_steps"]
    engine.global_samples = module["global_samples"]
    if not stage:
        more = {"load_optimizer_states": True} if engine.bfloat16_enabled() else {}
        zero.load_state_dict(_owned(module["optimizer"]), **more)
        return
    states: list[Any] = [None] * world  # DeepSpeed takes this rank's
    if same:
        state = stored.optimizer(rank)
        states[rank] = state if on_disk(zero) else _owned(state)
    else:
        states[rank] = _cut(engine, stored, rank)
    zero.load_state_dict(
        state_dict_list=states, load_optimizer_states=True, load_from_fp32_weights=engine.zero_load_from_fp32_weights()
    )
    state_onto_disk(zero.optimizer)
    if stage == 3:
        zero.checkpoint_event_epilogue()


def _module(engine: Any, stored: Stored, rank: int, same: bool) -> dict[str, Any]:
    """What DeepSpeed loads into the module, with its counters."""
    stage = engine.zero_optimization_stage()
    module = stored.module(rank if stage == 3 and same else 0)
    if same or 3 not in (stage, stored.stage):  # whole in both
        return module
    weights = stored.weights()
    if stage < 3:
        return {**module, "module": dict(weights), "frozen_param_fragments": None}
    # The placeholders that this model has for what is trained; of what is not, this rank's piece.
    own = engine.module.state_dict()
    buffers = {name: module["module"][name] for name in module["buffer_names"]}
    frozen = {p: engine.param_names[p] for p in engine.module.parameters() if not p.requires_grad}
    pieces = {name: _piece(p, weights[name], rank) for p, name in frozen.items() if name in weights}
    whole = pieces if len(pieces) == len(frozen) else None  # an adapter's has no base
    return {**module, "module": {**own, **buffers}, "frozen_param_fragments": whole}


def _piece(parameter: Any, whole: torch.Tensor, rank: int) -> torch.Tensor:
    """A rank's shard of a parameter at stage 3, with its padding."""
    size = parameter.partition_numel()
    own = whole.reshape(-1)[rank * size : (rank + 1) * size]
    return torch.cat([own, own.new_zeros(parameter.ds_tensor.numel() - len(own))])


def _owned(value: Any) -> Any:
    """The same with tensors in memory of their own: optimizers keep those that they are given, and a mapped file may
    be removed by another host.
    """
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, dict):
        return {key: _owned(v) for key, v in value.items()}
    return type(value)(map(_owned, value)) if type(value) in (list, tuple) else value


def _cut(engine: Any, stored: Stored, rank: int) -> dict[str, Any]:
    """The state of this rank's ZeRO optimizer from all that the ranks before wrote."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    before = stored.optimizer()
    kept = {key: before[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow")}
    flats = _flats_3(zero, engine.param_names, rank) if stage == 3 else _flats(zero, engine.param_names, rank)
    masters = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    now = zero.optimizer.param_groups
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in stored.base()["param_groups"]
    ]
    sizes = [len(group["params"]) for group in now]
    if stage == 3:  # which gives its flat tensors to the groups for a load alone
        sizes = [list(zero.sub_group_to_group_id.values()).count(g) for g in range(len(now))]
    ids = iter(range(sum(sizes)))
    base = {
        "state": {i: _state(stored, pieces, masters[i].numel()) for i, pieces in enumerate(flats)},
        "param_groups": [
            {**group, "params": [next(ids) for _ in range(size)]} for group, size in zip(groups, sizes, strict=True)
        ],
    }
    weights = [_filled(stored, MASTER, pieces, masters[i].numel()) for i, pieces in enumerate(flats)]
    if stage == 3:
        return {**kept, "fp32_flat_groups": weights, "optimizer_state_dict": base}
    return {
        **kept,
        "clip_grad": zero.clip_grad,
        "ds_version": stored.module()["ds_version"],
        "single_partition_of_fp32_groups": weights,
        "base_optimizer_state": base,
        "group_paddings": [0] * len(weights),
        "param_alignment_paddings": zero.round_robin_bit16_padding,
    }


# Of a flat tensor: the pieces in it, as (where, parameter, from, to).
Pieces = list[tuple[int, str, int, int]]


def _flats(zero: Any, names: dict, rank: int) -> list[Pieces]:
    """Stages 1 and 2: this rank's part of each group."""
    found = []
    for group, params in enumerate(zero.round_robin_bit16_groups):
        size = zero.single_partition_of_fp32_groups[group].numel()
        begin, pieces = rank * size, []
        for param, at in zip(params, zero.round_robin_bit16_offsets[group], strict=True):
            start, stop = max(begin - at, 0), min(begin + size - at, param.numel())
            if start < stop:
                pieces.append((at + start - begin, names[param], start, stop))
        found.append(pieces)
    return found


def _flats_3(zero: Any, names: dict, rank: int) -> list[Pieces]:
    """Stage 3: this rank's piece of every parameter."""
    found = []
    for params in zero.fp16_groups:
        pieces, at = [], 0
        for param in params:
            size = param.partition_numel()
            start, stop = rank * size, min((rank + 1) * size, param.ds_numel)
            if start < stop:
                pieces.append((at, names[param], start, stop))
            at += size
        found.append(pieces)
    return found


def _filled(stored: Stored, key: str, pieces: Pieces, numel: int) -> torch.Tensor:
    """A flat tensor from pieces of the checkpoint, its padding zero."""
    flat: torch.Tensor | None = None
    for at, name, start, stop in pieces:
        piece = stored.piece(name, key, start, stop)
        flat = torch.zeros(numel, dtype=piece.dtype) if flat is None else flat
        flat[at : at + len(piece)] = piece
    return torch.zeros(numel) if flat is None else flat


def _state(stored: Stored, pieces: Pieces, numel: int) -> dict[str, Any]:
    """The optimizer's state of a flat tensor: what is as long as it is cut anew, the rest (its step) is one for all."""
    first = next(iter(stored.places)) if not pieces else pieces[0][1]
    place = stored.places[first]
    before, size = stored.state(place.flat), stored.flat(0, place.flat, MASTER).numel()
    if stored.stage < 3:
        size += stored.optimizer()["group_paddings"][place.flat]
    found = {}
    for key, value in before.items():
        if torch.is_tensor(value) and value.dim() == 1 and value.numel() == size:
            found[key] = _filled(stored, key, pieces, numel).to(value.dtype)
        else:
            found[key] = value.clone() if torch.is_tensor(value) else value
    return found
