"""Element-wise parts of a decoder layer in Triton: RMSNorm, rotary embedding, gated MLP; forward and backward.

Each reads and writes every element once and computes in float32. They are what is left of a layer between its matrix
products and its attention; `fastft.ops.decoder` puts them together.
"""

import functools

import torch
from torch import Tensor

from fastft.ops.triton import interpreted, require

triton = require()
import triton.language as tl  # noqa: E402  (after require(), whose error names the extra)


@triton.jit
def _rms_forward(x, residual, weight, total, y, rstd, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    v = tl.load(x + row * columns + at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        v += tl.load(residual + row * columns + at, mask=mask, other=0.0).to(tl.float32)
        stored = v.to(total.dtype.element_ty)
        tl.store(total + row * columns + at, stored, mask=mask)
        v = stored.to(tl.float32)  # what the backward will see
    r = tl.rsqrt(tl.sum(v * v, axis=0) / columns + eps)
    tl.store(rstd + row, r)
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * columns + at, (v * r * w).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _rms_backward(dy, x, weight, rstd, extra, dx, y, dweight, rows, columns, each, BLOCK: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    w = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    first = program * each
    for row in range(first, tl.minimum(first + each, rows)):
        here = row * columns + at
        g = tl.load(dy + here, mask=mask, other=0.0).to(tl.float32)
        normed = tl.load(x + here, mask=mask, other=0.0).to(tl.float32)
        r = tl.load(rstd + row)
        normed = normed * r
        if y is not None:
            tl.store(y + here, (normed * w).to(y.dtype.element_ty), mask=mask)
        sums += g * normed
        g = g * w
        d = r * (g - normed * (tl.sum(g * normed, axis=0) / columns))
        if extra is not None:
            d += tl.load(extra + here, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + here, d.to(dx.dtype.element_ty), mask=mask)
    tl.store(dweight + program * columns + at, sums, mask=mask)


@triton.jit
def _rotate(source, out, cos, sin, heads, dim, SIGN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr):
    """One token's heads, from source to out (which may be the same)."""
    half = dim // 2
    head = tl.arange(0, HEADS)[:, None]
    j = tl.arange(0, HALF)[None, :]
    mask = (head < heads) & (j < half)
    at = head * dim + j
    a = tl.load(source + at, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + at + half, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(cos + j, mask=j < half, other=0.0).to(tl.float32)
    s = tl.load(sin + j, mask=j < half, other=0.0).to(tl.float32) * SIGN
    tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + half, (b * c + a * s).to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rope_forward(
    qkv, cos, sin, stride, heads, dim, period, SIGN: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = qkv + token * stride
    at = (token % period) * dim
    _rotate(row, row, cos + at, sin + at, heads, dim, SIGN, HEADS, HALF)


@triton.jit
def _rope_backward(
    dq, dk, dv, out, cos, sin, heads, groups, dim, period, HEADS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    at = (token % period) * dim
    row = out + token * (heads + 2 * groups) * dim
    _rotate(dq + token * heads * dim, row, cos + at, sin + at, heads, dim, -1.0, HEADS, HALF)
    _rotate(dk + token * groups * dim, row + heads * dim, cos + at, sin + at, groups, dim, -1.0, GROUPS, HALF)
    head = tl.arange(0, GROUPS)[:, None]
    j = tl.arange(0, 2 * HALF)[None, :]
    mask = (head < groups) & (j < dim)
    v = tl.load(dv + token * groups * dim + head * dim + j, mask=mask, other=0.0)
    tl.store(row + (heads + groups) * dim + head * dim + j, v, mask=mask)


@triton.jit
def _swiglu_forward(gate, up, a, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    g = tl.load(gate + row * stride + at, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(a + row * width + at, (g * tl.sigmoid(g) * u).to(a.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward(gate, up, da, a, dgate, dup, stride, width, BLOCK: tl.constexpr):
    """Every result may lie where an operand of its own elements does."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < width
    wide, narrow = row * stride + at, row * width + at
    g = tl.load(gate + wide, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + wide, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(da + narrow, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    if a is not None:
        tl.store(a + narrow, (g * s * u).to(a.dtype.element_ty), mask=mask)
    tl.store(dgate + wide, (grad * u * s * (1.0 + g * (1.0 - s))).to(dgate.dtype.element_ty), mask=mask)
    tl.store(dup + wide, (grad * g * s).to(dup.dtype.element_ty), mask=mask)


def _power(n: int) -> int:
    return triton.next_power_of_2(n)


def _warps(block: int) -> int:
    return min(max(block // 512, 4), 16)


@functools.cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def rms_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x + residual (x itself without one), (n, d); its norm times weight, (n, d); 1 / RMS of each row, (n,) float32.
    x and residual are contiguous.
    """
    rows, columns = x.shape
    total = x if residual is None else torch.empty_like(x)
    y, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32, device=x.device)
    block = _power(columns)
    stored = None if residual is None else total
    _rms_forward[(rows,)](x, residual, weight, stored, y, rstd, columns, eps, block, num_warps=_warps(block))
    return total, y, rstd


def rms_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    extra: Tensor | None = None,
    y: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x, plus ``extra``, and of weight: (n, d) in x's dtype, (d,) float32.

    ``y``, (n, d), receives the forward's norm again; ``out``, (n, d), which may be ``extra``, the gradient of x.
    """
    rows, columns = x.shape
    programs = min(rows, 4 if interpreted() else 4 * _multiprocessors(x.device.index or 0))
    each = -(-rows // programs)
    programs = -(-rows // each)
    dx = torch.empty_like(x) if out is None else out
    dweight = torch.empty(programs, columns, dtype=torch.float32, device=x.device)
    block = _power(columns)
    _rms_backward[(programs,)](
        dy, x, weight, rstd, extra, dx, y, dweight, rows, columns, each, block, num_warps=_warps(block)
    )
    return dx, dweight.sum(0)


def rope_forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, dim: int, back: bool = False) -> None:
    """Rotate the first ``heads`` heads of every row of qkv (n, ...) in place. cos, sin: (n or a divisor of n, dim).
    ``back``: the other way round, which is the gradient.
    """
    sign = -1.0 if back else 1.0
    _rope_forward[(qkv.shape[0],)](
        qkv, cos, sin, qkv.stride(0), heads, dim, cos.shape[0], sign, _power(heads), _power(dim // 2), num_warps=4
    )


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The gradient of qkv before the rotation, (n, (heads + 2 groups) * dim), from those after it (n, heads, dim)."""
    n, heads, dim = dq.shape
    groups = dk.shape[1]
    out = torch.empty(n, (heads + 2 * groups) * dim, dtype=dq.dtype, device=dq.device)
    _rope_backward[(n,)](
        dq, dk, dv, out, cos, sin, heads, groups, dim, cos.shape[0],
        _power(heads), _power(groups), _power(dim // 2), num_warps=4,
    )  # fmt: skip
    return out


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, contiguous, of two (n, width) whose rows lie equally far apart."""
    n, width = gate.shape
    a = torch.empty(n, width, dtype=gate.dtype, device=gate.device)
    block = min(_power(width), 1024)
    _swiglu_forward[(n, -(-width // block))](gate, up, a, gate.stride(0), width, block, num_warps=4)
    return a


def swiglu_backward(gate: Tensor, up: Tensor, da: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, (n, width) each, from that of the forward's result, (n, width) contiguous.

    ``in_place``: they take the memory of gate and up, and ``da`` becomes the forward's result. Otherwise gate and up
    are contiguous.
    """
    n, width = gate.shape
    dgate, dup = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    block = min(_power(width), 1024)
    grid = n, -(-width // block)
    a = da if in_place else None
    _swiglu_backward[grid](gate, up, da, a, dgate, dup, gate.stride(0), width, block, num_warps=4)
    return dgate, dup
