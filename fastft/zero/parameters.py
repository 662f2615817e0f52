"""Parameters, whole or held in shards by ZeRO-3, which leaves an empty tensor in their place."""

import torch


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def whole_numel(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def used_by(module: torch.nn.Module, parameters: list[torch.nn.Parameter]) -> None:
    """Have ZeRO-3 gather parameters for a module that uses them without their being its own."""
    from deepspeed.runtime.zero import register_external_parameter

    for parameter in parameters:
        register_external_parameter(module, parameter)
