"""AdamW in plain PyTorch, one tensor after another: what the kernels are tested against."""

import torch
from torch import Tensor

from fastft.ops import quantized_state


@torch.no_grad()
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
    """The interface of a kernel. Nothing waits for the device: a skipped step is selected, not branched on."""
    learning_rate = lr if lr_tensor is None else lr_tensor.double()
    for i, (param, exp_avg, exp_avg_sq) in enumerate(zip(params, exp_avgs, exp_avg_sqs, strict=True)):
        wide = torch.float64 if param.dtype == torch.float64 else torch.float32
        p = quantized_state.join(param, remainders[i]) if remainders else param.to(wide)
        g = grads[i].to(wide)
        if exp_avg_scales:
            m_old = quantized_state.dequantize(exp_avg, exp_avg_scales[i], signed=True)
            v_old = quantized_state.dequantize(exp_avg_sq, exp_avg_sq_scales[i], signed=False)
        else:
            m_old, v_old = exp_avg.to(wide), exp_avg_sq.to(wide)
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
        m = torch.lerp(m_old, g, 1 - beta1)
        v = (v_old * beta2).addcmul(g, g, value=1 - beta2)
        v_max = torch.maximum(max_exp_avg_sqs[i].to(wide), v) if max_exp_avg_sqs else v
        denominator = (v_max.sqrt() / correction2.sqrt()).add(eps)
        if decoupled:
            p = p * (1 - learning_rate * weight_decay)
        p = (p - (learning_rate / correction1) * (m / denominator)).to(wide)  # a 0-dim p has become float64

        random_p = random_m = random_v = None
        if stochastic_rounding or exp_avg.dtype in (torch.bfloat16, torch.uint8):
            random_p, random_m, random_v = quantized_state.random16(
                seed, step, offsets[i] if offsets else 0, param.numel()
            )
        _write_state(exp_avg, m, exp_avg_scales[i] if exp_avg_scales else None, True, random_m, found_inf)
        _write_state(exp_avg_sq, v, exp_avg_sq_scales[i] if exp_avg_sq_scales else None, False, random_v, found_inf)
        _write(steps[i], step, found_inf)
        if max_exp_avg_sqs:
            _write(max_exp_avg_sqs[i], v_max, found_inf)
        if copies:
            _write(copies[i], p, found_inf)
        if remainders:
            p, remainder = quantized_state.split(p)
            _write(remainders[i], remainder, found_inf)
        elif random_p is not None and stochastic_rounding:
            p = quantized_state.round_stochastic(p, random_p)
        _write(param, p, found_inf)


def _write_state(
    old: Tensor, new: Tensor, scales: Tensor | None, signed: bool, random: Tensor | None, found_inf: Tensor | None
) -> None:
    if scales is not None:
        new, new_scales = quantized_state.quantize(new, signed, random)
        _write(scales, new_scales, found_inf)
    elif old.dtype == torch.bfloat16:
        assert random is not None  # bfloat16 state is always rounded stochastically
        new = quantized_state.round_stochastic(new, random)
    _write(old, new, found_inf)


def _write(old: Tensor, new: Tensor, found_inf: Tensor | None) -> None:
    new = new.to(old.dtype)
    old.copy_(new if found_inf is None else torch.where(found_inf == 0, new, old))
