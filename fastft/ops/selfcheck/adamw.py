"""adamw: three steps with weight decay; param, state, step and the bfloat16 copy."""

import torch

from fastft.ops import adamw
from fastft.ops.selfcheck import TOLERANCE, relative, worst


def dtypes(dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """Of param and gradient."""
    return (dtype, dtype)


def check(backend: str, device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(3)
    param = torch.randn(1003, generator=generator).to(device, dtype)
    true_param = torch.nn.Parameter(param.double())
    optimizer = torch.optim.AdamW([true_param], lr=1e-2, weight_decay=0.1, foreach=False)
    m, v, step = (torch.zeros(shape, device=device) for shape in ((1003,), (1003,), ()))
    copy = torch.empty(1003, device=device, dtype=torch.bfloat16)
    for i in range(3):
        grad = torch.randn(1003, generator=generator).to(device, dtype)
        adamw(
            [param],
            [grad],
            [m],
            [v],
            [],
            [step],
            copies=[copy],
            lr=1e-2,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.1,
            backend=backend,
        )
        true_param.grad = grad.double()
        optimizer.step()
        if dtype == torch.bfloat16 and i < 2:  # what bfloat16 rounds away in between is no error of this step
            true_param.data = param.double()
    state = optimizer.state[true_param]
    # Held to the dtype's tolerance times its own scale: the copy is bfloat16 also beside float32 params.
    copy_error = relative([(copy, true_param.detach())]) * TOLERANCE[dtype] / TOLERANCE[torch.bfloat16]
    error = relative([(param, true_param.detach()), (m, state["exp_avg"]), (v, state["exp_avg_sq"])])
    return worst([error, copy_error, abs(step.item() - 3)])
