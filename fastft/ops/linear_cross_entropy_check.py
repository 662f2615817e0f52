"""What a caller of linear_cross_entropy may get wrong, and what torch.autocast makes of its inputs."""

import torch
from torch import Tensor


def autocast(*tensors: Tensor | None) -> tuple:
    """Under torch.autocast to bfloat16 float32 tensors become that, as torch.nn.functional.linear has them. float16,
    which the kernels do not take, changes nothing.
    """
    device = tensors[0].device.type if tensors[0] is not None else "cpu"
    if not (torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16):
        return tensors
    return tuple(t.bfloat16() if t is not None and t.dtype == torch.float32 else t for t in tensors)


def check(hidden, weight, target, bias, hidden2, weight2, chunk_bytes) -> None:
    """ValueError for tensors and options that do not fit together."""
    if hidden.ndim < 1 or hidden.shape[:-1] != target.shape:
        raise ValueError(
            f"hidden must be (..., H) and target (...); got {tuple(hidden.shape)} and {tuple(target.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1] or 0 in weight.shape:
        raise ValueError(f"weight must be (V, H) = (V > 0, {hidden.shape[-1]} > 0), not {tuple(weight.shape)}")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating, not {hidden.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), not {tuple(bias.shape)}")
    if hidden2 is not None:
        if hidden2.shape[:-1] != target.shape:
            raise ValueError(
                f"low_rank[0] must be (..., R) like hidden {tuple(hidden.shape)}, not {tuple(hidden2.shape)}"
            )
        if weight2.shape != (weight.shape[0], hidden2.shape[-1]):
            raise ValueError(
                f"low_rank[1] must be (V, R) = ({weight.shape[0]}, {hidden2.shape[-1]}), not {tuple(weight2.shape)}"
            )
    for name, tensor in (("weight", weight), ("bias", bias), ("low_rank[0]", hidden2), ("low_rank[1]", weight2)):
        if tensor is not None and (tensor.device, tensor.dtype) != (hidden.device, hidden.dtype):
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, hidden {hidden.dtype} on {hidden.device}")
    if chunk_bytes is not None and chunk_bytes < 1:
        raise ValueError(f"chunk_bytes must be positive, or None, not {chunk_bytes}")
