"""Quantized state and parameters, defined bit by bit in plain PyTorch:
the kernels do the same, and are tested against this.

Random numbers    A counter-based generator: a keyed integer hash (two multiply-xorshift rounds with the constants of
                  Wellons' lowbias32) of (seed, step, element), so that any shard of a tensor can be rounded alone. Each
                  element has a 16-bit number for its param, one for exp_avg and one for exp_avg_sq.
bfloat16          16 random bits are added below the last bit that is kept: up with the probability that makes the mean
                  exact.
Remainder         The lower half of a float32 as a signed 16-bit number. The bfloat16 beside it is the float32 rounded
                  to nearest, ties away from zero. Ties to even cannot work: an even bfloat16 is then nearest for 65537
                  float32 numbers.
8-bit codes       Blocks of 256 elements of the flat tensor with a scale each (Dettmers et al. 2022, arXiv 2110.02861),
                  but with small floats of 3 mantissa bits in place of their table, and powers of two for scales.
                  exp_avg: sign, 14 binades, then 2^-17 apart; exp_avg_sq: 30 binades, then 2^-33 apart, so that its
                  root reaches as far down as exp_avg. Coding a decoded number changes nothing, since no multiplication
                  by a scale rounds: states go through float32 checkpoints and back without the loss of a bit. A
                  positive exp_avg_sq never becomes 0, or a step would be exp_avg / eps. NaN, Inf and numbers above
                  2^126 turn their whole block into NaN.
"""

import torch
from torch import Tensor

BLOCK = 256
_MASK = 0xFFFFFFFF
_MANTISSA = 20  # bits of a float32 that a code drops
# (first exponent of the normal codes, what takes a float32's upper 12 bits to its code)
_SIGNED = (-14, (127 - 14 - 1) << 3)
_UNSIGNED = (-30, (127 - 30 - 1) << 3)
_MIN_SCALE = (127 - 93) << 23  # as bits: the smallest code of 2^-33 is then still a normal float32
_MAX_TOP = (127 + 126) << 23  # as bits: the inverse of a larger scale would be denormal


def blocks(numel: int) -> int:
    """Blocks of 256, the last one perhaps shorter, in `numel` elements."""
    return -(-numel // BLOCK)


def random16(seed: int, step: Tensor, offset: int, numel: int) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of [0, 2^16) for param, exp_avg and exp_avg_sq of
    the elements offset, offset + 1, ...: int64 (numel,) each.

    seed    of [0, 2^63).
    step    0-dim, the number of this step, the first being 1; its device is where the numbers are made.
    """
    position = torch.arange(offset, offset + numel, dtype=torch.int64, device=step.device)
    base = _mix(step.to(torch.int64) + seed_base(seed) & _MASK)
    key0 = _mix(base + 0x85EBCA6B + (position >> 32) & _MASK)
    key1 = _mix(base ^ 0xC2B2AE35)
    x = (position & _MASK) ^ key0
    x = (x ^ x >> 16) * 0x7FEB352D + key1 & _MASK
    x = (x ^ x >> 15) * 0x846CA68B & _MASK
    first = x ^ x >> 16
    # For any lower half of `first`, the upper half of this product takes each value once; so exp_avg's and exp_avg_sq's
    # numbers are independent.
    second = first * 0x9E3779B1 & _MASK
    return first >> 16, first & 0xFFFF, second >> 16


def seed_base(seed: int) -> int:
    """What the random numbers need of the seed: a number of [0, 2^32)."""
    return _mix(_mix((seed & _MASK) ^ 0x9E3779B9) + (seed >> 32) & _MASK)


def _mix(x):
    """lowbias32 on a Python int or an int64 tensor, both of [0, 2^32)."""
    x = (x ^ x >> 16) * 0x7FEB352D & _MASK
    x = (x ^ x >> 15) * 0x846CA68B & _MASK
    return x ^ x >> 16


def round_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """x (float32) as bfloat16; random: int64 of [0, 2^16), any shape with x's elements.

    NaN stays NaN, Inf stays Inf.
    """
    bits = _bits(x)
    rounded = bits + random.view(x.shape) >> 16
    return _from_upper(torch.where(x.isnan(), bits >> 16 | 0x40, rounded))


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (float32) as the nearest bfloat16, ties away from zero, and the int16 remainder."""
    bits = _bits(x)
    upper = torch.where(x.isnan(), bits >> 16 | 0x40, bits + 0x8000 >> 16)
    return _from_upper(upper), _signed16(torch.where(x.isnan(), 0, bits))


def join(param: Tensor, remainder: Tensor) -> Tensor:
    """The float32 that `split` took apart."""
    return (_bits(param.float()) + remainder.to(torch.int64)).to(torch.int32).view(torch.float32)


def quantize(x: Tensor, signed: bool, random: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x as uint8 codes of x's shape, contiguous, and float32 scales (blocks(numel),).

    random  int64 of [0, 2^16), one per element: rounded stochastically; None: to nearest, ties away from zero.
    signed  False takes no negative numbers.
    """
    low, offset = _SIGNED if signed else _UNSIGNED
    flat = x.reshape(-1).float()
    random = torch.full_like(flat, 0x8000, dtype=torch.int64) if random is None else random.reshape(-1)
    rounded = (_bits(flat.abs()) + (random << 4)) >> _MANTISSA << _MANTISSA
    count = blocks(flat.numel())
    top = torch.nn.functional.pad(rounded, (0, count * BLOCK - flat.numel())).view(count, BLOCK)
    # The next power of two above the largest rounded number, which makes the scale of decoded numbers the same again.
    top = top.amax(1) if count else top.new_zeros(0)
    scale_bits = (top + 0x7FFFFF >> 23 << 23).clamp(min=_MIN_SCALE)
    broken = top > _MAX_TOP
    scales = scale_bits.masked_fill(broken, 0x7FC00000).to(torch.int32).view(torch.float32)
    inverse = ((254 << 23) - scale_bits).masked_fill(broken, 0).to(torch.int32).view(torch.float32)

    scaled = flat.abs() * inverse.repeat_interleave(BLOCK)[: flat.numel()]
    steps_below = torch.floor(scaled.clamp(max=2.0**low) * 2.0 ** (3 - low) + random * 2.0**-16).to(torch.int64)
    steps_above = (_bits(scaled) + (random << 4) >> _MANTISSA) - offset
    code = torch.where(scaled < 2.0**low, steps_below, steps_above)
    code = code | (flat.signbit().to(torch.int64) << 7) if signed else torch.where(flat > 0, code.clamp(min=1), code)
    code = code.masked_fill(broken.repeat_interleave(BLOCK)[: flat.numel()], 0)
    return code.to(torch.uint8).view(x.shape), scales


def dequantize(codes: Tensor, scales: Tensor, signed: bool) -> Tensor:
    """The float32 numbers of `quantize`'s codes, of their shape."""
    low, offset = _SIGNED if signed else _UNSIGNED
    code = codes.reshape(-1).to(torch.int64)
    magnitude = code & 0x7F if signed else code
    above = (magnitude + offset << _MANTISSA).to(torch.int32).view(torch.float32)
    x = (
        torch.where(magnitude < 8, magnitude * 2.0 ** (low - 3), above)
        * scales.repeat_interleave(BLOCK)[: code.numel()]
    )
    if signed:
        x = torch.where(code > 0x7F, -x, x)
    return x.view(codes.shape)


def _bits(x: Tensor) -> Tensor:
    """float32 as int64 of [0, 2^32)."""
    return x.view(torch.int32).to(torch.int64) & _MASK


def _from_upper(upper: Tensor) -> Tensor:
    return _signed16(upper).view(torch.bfloat16)


def _signed16(x: Tensor) -> Tensor:
    """The lower 16 bits of an int64, as int16."""
    return ((x & 0xFFFF ^ 0x8000) - 0x8000).to(torch.int16)
