"""torch.func's transforms and forward-mode differentiation, which the ops have no rules for."""

import torch
from torch import Tensor


def transformed(*tensors: Tensor | None) -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) or forward-mode differentiation looks at any of them.

    The ops' gradients are computed by kernels, once and in advance: such a transform would ask for what is not there.
    """
    if torch.compiler.is_compiling():
        return False
    forward_ad = torch.autograd.forward_ad
    dual = forward_ad._current_level >= 0
    return any(
        t is not None
        and (
            torch._C._functorch.is_functorch_wrapped_tensor(t)
            or (dual and forward_ad.unpack_dual(t).tangent is not None)
        )
        for t in tensors
    )


def refuse_transforms(op: str, *tensors: Tensor | None) -> None:
    """RuntimeError, naming the op, where a transform of torch.func would get a wrong answer or torch's raw error."""
    if transformed(*tensors):
        raise RuntimeError(f"{op} has no rule for torch.func's transforms and forward-mode differentiation")
