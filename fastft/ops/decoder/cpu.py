"""A decoder layer's element-wise parts and its attention by the kernels of `fastft._C` on a CPU: the same functions as
those of `fastft.ops.triton.decoder`, which says what each does, and the two of `fastft.ops.decoder.attention`.

Arithmetic is in float32, results are rounded once; the same bits whatever the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastft.ops.decoder.flash import heads_side_by_side
from fastft.ops.native import DTYPES, address, module, tag


def refuses(dtype: torch.dtype) -> str:
    """Why the kernels cannot be had for tensors of this dtype; "" when they can."""
    if dtype not in DTYPES:
        return f"the CPU's kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        module()
    except ImportError as error:
        return f"fastft._C is {error}"
    return ""


def _same(like: Tensor, *tensors: Tensor | None) -> dict[str, int]:
    """What every call ends with. The kernels get addresses: a tensor of another dtype would be read as it is not."""
    for t in tensors:
        if t is not None and (t.dtype != like.dtype or t.device.type != "cpu"):
            raise ValueError(f"tensors of {like.dtype} on the CPU are wanted, not of {t.dtype} on {t.device}")
    return {"dtype": tag(like.dtype), "num_threads": torch.get_num_threads()}


def _whole(*tensors: Tensor | None) -> None:
    for t in tensors:
        if t is not None and not t.is_contiguous():
            raise ValueError(f"contiguous tensors are wanted, not strides of {t.stride()} for {tuple(t.shape)}")


def rms_forward(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    call = _same(x, residual, weight)
    _whole(x, residual, weight)
    rows, columns = x.shape
    total = x if residual is None else torch.empty_like(x)
    y, rstd = torch.empty_like(x), torch.empty(rows, dtype=torch.float32)
    module().rms_forward(
        x=x.data_ptr(), residual=address(residual), weight=weight.data_ptr(), total=total.data_ptr(), y=y.data_ptr(),
        rstd=rstd.data_ptr(), rows=rows, columns=columns, eps=eps, **call,
    )  # fmt: skip
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
    call = _same(x, dy, weight, extra, y, out)
    _whole(dy, x, weight, extra, y, out)
    rows, columns = x.shape
    dx = torch.empty_like(x) if out is None else out
    dweight = torch.empty(columns, dtype=torch.float32)
    module().rms_backward(
        dy=dy.data_ptr(), x=x.data_ptr(), weight=weight.data_ptr(), rstd=rstd.data_ptr(), extra=address(extra),
        dx=dx.data_ptr(), y=address(y), dweight=dweight.data_ptr(), rows=rows, columns=columns, **call,
    )  # fmt: skip
    return dx, dweight


def rope_forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, dim: int, back: bool = False) -> None:
    call = _same(qkv)
    cos, sin = cos.float().contiguous(), sin.float().contiguous()
    module().rope(
        array=qkv.data_ptr(), cos=cos.data_ptr(), sin=sin.data_ptr(), rows=qkv.shape[0], stride=qkv.stride(0),
        heads=heads, dim=dim, period=cos.shape[0], table_stride=cos.shape[1], back=back, **call,
    )  # fmt: skip


def rope_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.cat([t.flatten(1) for t in (dq, dk, dv)], 1)
    rope_forward(out, cos, sin, dq.shape[1] + dk.shape[1], dq.shape[2], back=True)
    return out


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    call = _same(gate, up)
    n, width = gate.shape
    out = torch.empty(n, width, dtype=gate.dtype)
    module().gated_forward(
        gate=gate.data_ptr(), up=up.data_ptr(), out=out.data_ptr(), rows=n, width=width, stride=gate.stride(0), **call
    )
    return out


def swiglu_backward(gate: Tensor, up: Tensor, da: Tensor, *, in_place: bool = False) -> tuple[Tensor, Tensor]:
    call = _same(gate, up, da)
    _whole(da)
    n, width = gate.shape
    dgate, dup = (gate, up) if in_place else (torch.empty_like(gate), torch.empty_like(up))
    module().gated_backward(
        gate=gate.data_ptr(), up=up.data_ptr(), dout=da.data_ptr(), out=da.data_ptr() if in_place else 0,
        dgate=dgate.data_ptr(), dup=dup.data_ptr(), rows=n, width=width, stride=gate.stride(0), **call,
    )  # fmt: skip
    return dgate, dup


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``attention.forward``: q (n, heads, dim), k and v (n, groups, dim); the result, and the rows' logsumexp."""
    q, k, v = (heads_side_by_side(t) for t in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[:2], dtype=torch.float32)
    module().attention_forward(**_attention(q, k, v, out, lse, bounds, scale, window))
    return out, (lse,)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: tuple[Tensor, ...],
    bounds: Tensor,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention.backward``: the gradients are parts of one tensor, side by side."""
    q, k, v = (heads_side_by_side(t) for t in (q, k, v))
    grad = grad.contiguous()
    sizes = [t.shape[1] * t.shape[2] for t in (q, k, v)]
    whole = torch.empty(q.shape[0], sum(sizes), dtype=q.dtype)
    parts = tuple(part.unflatten(1, (-1, q.shape[2])) for part in whole.split(sizes, 1))
    call = _attention(q, k, v, out, kept[0], bounds, scale, window) | _same(q, grad)
    names = ("dq", "dk", "dv")
    module().attention_backward(
        **call,
        grad=grad.data_ptr(),
        **{name: part.data_ptr() for name, part in zip(names, parts, strict=True)},
        **{f"{name}_stride": part.stride(0) for name, part in zip(names, parts, strict=True)},
    )
    return parts[0], parts[1], parts[2]


def _attention(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bounds: Tensor, scale: float, window: int | None
) -> dict[str, Any]:
    call = _same(q, k, v, out)
    _whole(out, lse, bounds)
    if bounds.dtype != torch.int32 or k.shape != v.shape or k.shape[::2] != q.shape[::2]:
        raise ValueError(f"bounds of {bounds.dtype}, or shapes {[tuple(t.shape) for t in (q, k, v)]} that do not fit")
    return call | {
        "q": q.data_ptr(), "k": k.data_ptr(), "v": v.data_ptr(),
        "q_stride": q.stride(0), "k_stride": k.stride(0), "v_stride": v.stride(0),
        "bounds": bounds.data_ptr(), "documents": len(bounds) - 1, "tokens": q.shape[0],
        "heads": q.shape[1], "groups": k.shape[1], "dim": q.shape[2],
        "scale": scale, "window": window or 0, "out": out.data_ptr(), "lse": lse.data_ptr(),
    }  # fmt: skip
