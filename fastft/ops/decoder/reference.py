"""The element-wise parts of a decoder layer in plain torch, in float32: the same functions as those of
`fastft.ops.triton.decoder`, which says what each does.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = x if residual is None else x + residual
    v = total.float()
    rstd = torch.rsqrt(v.square().mean(-1) + eps)
    return total, (v * rstd[:, None] * weight.float()).to(x.dtype), rstd


def rms_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    extra: Tensor | None = None,
    y: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    normed = x.float() * rstd[:, None]
    g = dy.float()
    if y is not None:
        y.copy_(normed * weight.float())
    dweight = (g * normed).sum(0)
    g = g * weight.float()
    dx = rstd[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    if extra is not None:
        dx = dx + extra.float()
    return dx.to(x.dtype) if out is None else out.copy_(dx), dweight


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    n, _, dim = x.shape
    c, s = (t.float()[:, None, : dim // 2].repeat(n // t.shape[0], 1, 1) for t in (cos, sin))
    a, b = x.float().split(dim // 2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)


def rope_forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, dim: int, back: bool = False) -> None:
    sin = -sin if back else sin
    part = qkv[:, : heads * dim]
    part.copy_(_rotated(part.unflatten(1, (heads, dim)), cos, sin).flatten(1))


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([t.flatten(1) for t in (_rotated(dq, cos, -sin), _rotated(dk, cos, -sin), dv)], 1)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu_backward(gate: Tensor, up: Tensor, da: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    g, u, grad = gate.float(), up.float(), da.float()
    s = torch.sigmoid(g)
    a, dgate, dup = g * s * u, grad * u * s * (1 + g * (1 - s)), grad * g * s
    if not in_place:
        return dgate.to(gate.dtype), dup.to(up.dtype)
    da.copy_(a)
    return gate.copy_(dgate), up.copy_(dup)
