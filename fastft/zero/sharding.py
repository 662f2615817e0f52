"""A model's parameters into the shards of ZeRO-3, before there is an engine: no rank ever holds the whole model."""

from __future__ import annotations

from typing import Any

import torch

from fastft.zero.making import Held, held


def shard(model: torch.nn.Module, settings: dict, dtype: torch.dtype) -> None:
    """Keep this rank's part of every parameter and let go of the rest, one parameter at a time.

    DeepSpeed does this when its engine begins, and there sends every parameter from rank 0 to the others, which thereby
    write to all of what they had mapped of the files. Here each rank reads its own part: all ranks must have the same
    model.

    Parameters
    ----------
    model : Module
        As it was loaded or made: of weights that are mapped from a file only this rank's part is read, and parameters
        may be cut already (``Making``).
    settings : dict
        DeepSpeed's, of the engine that is to come.
    dtype : torch.dtype
        Of the parameters, whatever they are now. All: DeepSpeed lays them one behind the other in one tensor, and its
        engine would convert those, too, that transformers keeps in float32.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    made: Any = Init(module=torch.nn.Module(), config_dict_or_path=settings)
    by_part = made.param_swapper is None and made.zero_param_process_group is None
    for parameter in model.parameters():
        wanted = dtype if parameter.is_floating_point() else parameter.dtype
        source = held(parameter)
        assert source or parameter.numel() < 2 or any(parameter.stride()), "a parameter whose part is lost"
        if by_part and (source or wanted != parameter.dtype):
            _part_of(made, parameter, source or Held(parameter.data), wanted)
            continue
        if source:  # which DeepSpeed divides in ways of its own
            parameter.data = source.whole(parameter, made.local_device)
            del parameter.fastft_held  # type: ignore[attr-defined]
        parameter.data = parameter.data.to(made.local_device, wanted)
        made._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]
    made._keep_in_fp32(model)


def _part_of(made: Any, parameter: Any, source: Held, dtype: torch.dtype) -> None:
    """Give a parameter its shard, of this dtype, without the rest of it: DeepSpeed takes a shard that is there."""
    from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus

    made._convert_to_deepspeed_param(parameter)
    whole = made._aligned_size(parameter)
    size = whole // made._partition_world_size(parameter)
    device = made.local_device if parameter.ds_persist else made.remote_device
    part = torch.empty(size, dtype=dtype, device=device)
    part = part.pin_memory() if made.pin_memory else part
    source.into(part)
    part.ds_numel, part.status, part.final_location = size, PartitionedParamStatus.AVAILABLE, None  # type: ignore
    parameter.ds_tensor, parameter.ds_numel_aligned = part, whole
    parameter.partition()
    parameter.data = torch.empty(0, dtype=dtype, device=made.local_device)
    if hasattr(parameter, "fastft_held"):
        del parameter.fastft_held
