"""AdamW in Triton: one launch per tensor, one pass over its memory."""

import torch
from torch import Tensor

from fastft.ops import quantized_state
from fastft.ops.triton import require

triton = require()
import triton.language as tl  # noqa: E402  (after require(), whose error names the extra)

BLOCK = 1024  # elements of a program; four blocks of 8-bit state
STATE_BLOCK = tl.constexpr(quantized_state.BLOCK)
STATE_BLOCKS = tl.constexpr(BLOCK // quantized_state.BLOCK)


@triton.jit
def _mix(x):
    """lowbias32; x and everything below is uint32."""
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _random16(seed_base, step, position):
    """quantized_state.random16: numbers for param, exp_avg, exp_avg_sq.
    seed_base: what the host made of the seed; position: int64.
    """
    base = _mix((step.to(tl.int64) + seed_base).to(tl.uint32))
    high = (position >> 32).to(tl.uint32)
    key0 = _mix(base + tl.full((), 0x85EBCA6B, tl.uint32) + high)
    key1 = _mix(base ^ tl.full((), 0xC2B2AE35, tl.uint32))
    x = position.to(tl.uint32) ^ key0
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32) + key1
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    first = x ^ (x >> 16)
    return first >> 16, first & 0xFFFF, (first * tl.full((), 0x9E3779B1, tl.uint32)) >> 16


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _upper(x, random):
    """x as bfloat16: `random` (of [0, 2^16)) is added below the last bit that is kept. NaN stays NaN."""
    rounded = tl.where(x != x, (_bits(x) >> 16) | 0x40, (_bits(x) + random) >> 16)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _decode(code, scale, SIGNED: tl.constexpr):
    magnitude = code.to(tl.uint32)
    if SIGNED:
        magnitude = magnitude & 0x7F
        x = (
            tl.where(
                magnitude < 8,
                magnitude.to(tl.float32) * 2.0**-17,
                ((magnitude + 896) << 20).to(tl.float32, bitcast=True),
            )
            * scale
        )
        return tl.where(code > 0x7F, -x, x)
    return (
        tl.where(
            magnitude < 8, magnitude.to(tl.float32) * 2.0**-33, ((magnitude + 768) << 20).to(tl.float32, bitcast=True)
        )
        * scale
    )


@triton.jit
def _encode(x, random, SIGNED: tl.constexpr):
    """(codes, scales) of x (blocks, 256); quantized_state.quantize."""
    top = tl.max((_bits(tl.abs(x)) + (random << 4)) & 0xFFF00000, axis=1)
    scale_bits = tl.maximum((top + 0x7FFFFF) & 0x7F800000, tl.full((), 34 << 23, tl.uint32))
    broken = top > 253 << 23
    scale = tl.where(broken, 0x7FC00000, scale_bits).to(tl.uint32).to(tl.float32, bitcast=True)
    inverse = tl.where(broken, 0, (254 << 23) - scale_bits).to(tl.uint32).to(tl.float32, bitcast=True)
    scaled = tl.abs(x) * inverse[:, None]
    fraction = random.to(tl.float32) * 2.0**-16
    above = (_bits(scaled) + (random << 4)) >> 20
    if SIGNED:
        below = (tl.minimum(scaled, 2.0**-14) * 2.0**17 + fraction).to(tl.int32).to(tl.uint32)
        code = tl.where(scaled < 2.0**-14, below, above - 896) | ((_bits(x) >> 31) << 7)
    else:
        below = (tl.minimum(scaled, 2.0**-30) * 2.0**33 + fraction).to(tl.int32).to(tl.uint32)
        code = tl.where(scaled < 2.0**-30, below, above - 768)
        code = tl.where((code == 0) & (x > 0), 1, code)
    return tl.where(broken[:, None], 0, code).to(tl.uint8), scale


@triton.jit
def _adamw_kernel(
    param,
    grad,
    exp_avg,
    exp_avg_sq,
    max_exp_avg_sq,  # or None
    copy,  # or None
    remainder,  # int16, or None
    exp_avg_scale,  # or None, as exp_avg_sq_scale: float32, one for 256 elements
    exp_avg_sq_scale,
    factors,  # float32[4]: lr / (1 - beta1^t), sqrt(1 - beta2^t), 1 - lr * weight_decay, t
    grad_scale,  # or None
    found_inf,  # or None
    numel,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    weight_decay,
    seed_base,
    offset,
    DECOUPLED: tl.constexpr,
    MAXIMIZE: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    go = True
    if found_inf is not None:
        go = tl.load(found_inf) == 0.0
    if go:
        block = tl.program_id(0).to(tl.int64) * STATE_BLOCKS + tl.arange(0, STATE_BLOCKS)
        i = block[:, None] * STATE_BLOCK + tl.arange(0, STATE_BLOCK)[None, :]
        mask = i < numel
        block_mask = block * STATE_BLOCK < numel
        step_size = tl.load(factors)
        root_correction2 = tl.load(factors + 1)
        decay = tl.load(factors + 2)
        p = tl.load(param + i, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(grad + i, mask=mask, other=0.0).to(tl.float32)
        if remainder is not None:
            p = (_bits(p) + tl.load(remainder + i, mask=mask, other=0).to(tl.int32).to(tl.uint32)).to(
                tl.float32, bitcast=True
            )
        if exp_avg_scale is not None:
            m = _decode(
                tl.load(exp_avg + i, mask=mask, other=0),
                tl.load(exp_avg_scale + block, mask=block_mask, other=0.0)[:, None],
                True,
            )
            v = _decode(
                tl.load(exp_avg_sq + i, mask=mask, other=0),
                tl.load(exp_avg_sq_scale + block, mask=block_mask, other=0.0)[:, None],
                False,
            )
        else:
            m = tl.load(exp_avg + i, mask=mask, other=0.0).to(tl.float32)
            v = tl.load(exp_avg_sq + i, mask=mask, other=0.0).to(tl.float32)
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
        half_state: tl.constexpr = exp_avg.dtype.element_ty == tl.bfloat16
        if STOCHASTIC or half_state or exp_avg_scale is not None:
            random_p, random_m, random_v = _random16(seed_base, tl.load(factors + 3), offset + i)
        if exp_avg_scale is not None:
            m_code, m_scale = _encode(m, random_m, True)
            v_code, v_scale = _encode(v, random_v, False)
            tl.store(exp_avg + i, m_code, mask=mask)
            tl.store(exp_avg_sq + i, v_code, mask=mask)
            tl.store(exp_avg_scale + block, m_scale, mask=block_mask)
            tl.store(exp_avg_sq_scale + block, v_scale, mask=block_mask)
        elif half_state:
            tl.store(exp_avg + i, _upper(m, random_m), mask=mask)
            tl.store(exp_avg_sq + i, _upper(v, random_v), mask=mask)
        else:
            tl.store(exp_avg + i, m, mask=mask)
            tl.store(exp_avg_sq + i, v, mask=mask)
        if max_exp_avg_sq is not None:
            v = tl.maximum(
                tl.load(max_exp_avg_sq + i, mask=mask, other=0.0).to(tl.float32), v, propagate_nan=tl.PropagateNan.ALL
            )
            tl.store(max_exp_avg_sq + i, v.to(max_exp_avg_sq.dtype.element_ty), mask=mask)
        # Rounded to nearest: the fast square root and division are off by some ulp, and memory is the limit anyway.
        denominator = tl.div_rn(tl.sqrt_rn(v), root_correction2) + eps
        p -= step_size * tl.div_rn(m, denominator)
        if remainder is not None:
            lower = tl.where(p != p, 0, _bits(p)).to(tl.uint16).to(tl.int16, bitcast=True)
            tl.store(param + i, _upper(p, 0x8000), mask=mask)
            tl.store(remainder + i, lower, mask=mask)
        elif STOCHASTIC:
            tl.store(param + i, _upper(p, random_p), mask=mask)
        else:
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
    factors = torch.empty((len(params), 4), dtype=torch.float32, device=device)
    factors[:, 0] = learning_rate / (1.0 - beta1**t)
    factors[:, 1] = (1.0 - beta2**t).sqrt()
    factors[:, 2] = 1.0 - learning_rate * weight_decay
    factors[:, 3] = t
    with torch.cuda.device(device if device.type == "cuda" else -1):  # -1: do nothing
        for i, param in enumerate(params):
            if param.numel() == 0:
                continue
            _adamw_kernel[(triton.cdiv(param.numel(), BLOCK),)](
                param,
                grads[i],
                exp_avgs[i],
                exp_avg_sqs[i],
                max_exp_avg_sqs[i] if max_exp_avg_sqs else None,
                copies[i] if copies else None,
                remainders[i] if remainders else None,
                exp_avg_scales[i] if exp_avg_scales else None,
                exp_avg_sq_scales[i] if exp_avg_sq_scales else None,
                factors[i],
                grad_scale,
                found_inf,
                param.numel(),
                beta2,
                1.0 - beta1,  # here, in float64: a float32 beta2 makes it off by 1.3e-5
                1.0 - beta2,
                eps,
                weight_decay,
                quantized_state.seed_base(seed),
                offsets[i] if offsets else 0,
                DECOUPLED=decoupled,
                MAXIMIZE=maximize,
                STOCHASTIC=stochastic_rounding,
            )
    torch._foreach_add_(steps, 1.0 if found_inf is None else (found_inf == 0).float())
