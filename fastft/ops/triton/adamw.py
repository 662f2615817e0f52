"""AdamW in Triton: one launch per tensor, one pass over its memory."""

import torch
from torch import Tensor

from fastft.ops.triton import require

triton = require()
import triton.language as tl  # noqa: E402  (after require(), whose error names the extra)


@triton.jit
def _adamw_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,  # or None
    copy,  # or None
    factors,  # float32[3]: lr / (1 - beta1^t), sqrt(1 - beta2^t), 1 - lr * weight_decay
    grad_scale,  # or None
    found_inf,  # or None
    numel,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    weight_decay,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    go = True
    if found_inf is not None:
        go = tl.load(found_inf) == 0.0
    if go:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = i < numel
        step_size = tl.load(factors)
        root_correction2 = tl.load(factors + 1)
        decay = tl.load(factors + 2)
        p = tl.load(param + i, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + i, mask=mask, other=0.0).to(tl.float32)
        m = tl.load(exp_avg + i, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq + i, mask=mask, other=0.0)
        if grad_scale is not None:
            g *= tl.load(grad_scale)
        if MAXIMIZE:
            g = -g
        if DECOUPLED:
            p *= decay
        else:
            g += weight_decay * p
        m += (g - m) * one_minus_beta1
        v = v * beta2 + one_minus_beta2 * g * g
        tl.store(exp_avg + i, m, mask=mask)
        tl.store(exp_avg_sq + i, v, mask=mask)
        if max_exp_avg_sq is not None:
            v = tl.maximum(tl.load(max_exp_avg_sq + i, mask=mask, other=0.0), v, propagate_nan=tl.PropagateNan.ALL)
            tl.store(max_exp_avg_sq + i, v, mask=mask)
        # Rounded to nearest: the fast square root and division are off by some ulp, and memory is the limit anyway.
        denominator = tl.div_rn(tl.sqrt_rn(v), root_correction2) + eps
        p -= step_size * tl.div_rn(m, denominator)
        tl.store(param + i, p.to(param.dtype.element_ty), mask=mask)
        if copy is not None:
            tl.store(copy + i, p.to(copy.dtype.element_ty), mask=mask)


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
    remainders: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    offsets: list[int],
    *,
    lr: float,
    lr_tensor: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seed: int,
    stochastic_rounding: bool,
) -> None:
    """All tensors of one index have one dense layout; all of a list one dtype and device."""
    device = params[0].device
    # Few numbers, so in float64 and by torch: in float32 1 - beta2^t is off by 1.3e-5 at the first step.
    t = torch.stack(steps).double() + 1.0
    learning_rate = torch.full((), lr, dtype=torch.float64, device=device) if lr_tensor is None else lr_tensor.double()
    factors = torch.empty((len(params), 3), dtype=torch.float32, device=device)
    factors[:, 0] = learning_rate / (1.0 - beta1**t)
    factors[:, 1] = (1.0 - beta2**t).sqrt()
    factors[:, 2] = 1.0 - learning_rate * weight_decay
    block = 1024
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: do nothing
        for i, param in enumerate(params):
            if param.numel() == 0:
                continue
            _adamw_kernel[(triton.cdiv(param.numel(), block),)](
                param,
                grads[i],
                exp_avgs[i],
                exp_avg_sqs[i],
                max_exp_avg_sqs[i] if max_exp_avg_sqs else None,
                copies[i] if copies else None,
                factors[i],
                grad_scale,
                found_inf,
                param.numel(),
                beta2,
                1.0 - beta1,  # here, in float64: a float32 beta2 makes it off by 1.3e-5
                1.0 - beta2,
                eps,
                weight_decay,
                DECOUPLED=decoupled,
                MAXIMIZE=maximize,
                BLOCK=block,
            )
    torch._foreach_add_(steps, 1.0 if found_inf is None else (found_inf == 0).float())
