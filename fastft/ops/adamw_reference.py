"""AdamW in plain PyTorch, one tensor after another: what the kernels are held against."""

import torch
from torch import Tensor


def adamw(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    copies: list[Tensor],
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
) -> None:
    """The interface of a kernel. Nothing waits for the device: a skipped step is selected, not branched on."""
    learning_rate = lr if lr_tensor is None else lr_tensor.double()
    for i, (param, exp_avg, exp_avg_sq) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
        p = param.to(exp_avg.dtype)
        g = grads[i].to(exp_avg.dtype)
        if grad_scale is not None:
            g = g * grad_scale
        if maximize:
            g = -g
        if not decoupled:
            g = g + weight_decay * p
        step = steps[i] + 1
        # float64: in float32 1 - 0.999 is off by 1.3e-5, and the first steps divide by it.
        correction1 = 1 - beta1 ** step.double()
        correction2 = 1 - beta2 ** step.double()
        m = torch.lerp(exp_avg, g, 1 - beta1)
        v = (exp_avg_sq * beta2).addcmul(g, g, value=1 - beta2)
        v_max = torch.maximum(max_exp_avg_sqs[i], v) if max_exp_avg_sqs else v
        denominator = (v_max.sqrt() / correction2.sqrt()).add(eps)
        if decoupled:
            p = p * (1 - learning_rate * weight_decay)
        p = p - (learning_rate / correction1) * (m / denominator)

        _write(param, p, found_inf)
        _write(exp_avg, m, found_inf)
        _write(exp_avg_sq, v, found_inf)
        _write(steps[i], step, found_inf)
        if max_exp_avg_sqs:
            _write(max_exp_avg_sqs[i], v_max, found_inf)
        if copies:
            _write(copies[i], p, found_inf)


def _write(old: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    new = new.to(old.dtype)
    old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))
