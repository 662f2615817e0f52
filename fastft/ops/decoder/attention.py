"""Causal attention within documents of any length that lie one after the other: nothing is computed that a mask would
hide.

On a Hopper GPU it is cuDNN's, where nvidia-cudnn-frontend is installed (extra ``gpu``); on others the flash attention
that torch carries; on a CPU the kernels of `fastft.ops.decoder.cpu`, or, where those are not built, one document after
the other in plain torch.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.ops import native
from fastft.ops.decoder import cpu, cudnn, flash


def refuses(query: Tensor) -> str:
    """Why attention by document cannot be had for tensors like ``query`` (..., heads, dim); "" when it can."""
    if not query.is_cuda:
        return ""
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"flash attention takes bf16 and fp16, not {str(query.dtype).removeprefix('torch.')}"
    if query.shape[-1] > 256 or query.shape[-1] % 8:
        return f"flash attention takes heads of up to 256 elements, a multiple of 8, not {query.shape[-1]}"
    if torch.cuda.get_device_capability(query.device)[0] < 8:
        return "flash attention needs an Ampere GPU or a later one"
    return ""


def slow(device: torch.device, dtype: torch.dtype) -> str:
    """Why attention by document is not taken unasked on such a device; "" where it is faster than by a mask."""
    if device.type != "cpu":
        return ""
    return cpu.refuses(dtype) or (
        "" if native.module().cpu_path() != "scalar" else "this CPU has neither AVX2 nor AVX-512"
    )


def kernels(query: Tensor, groups: int) -> str:
    """What computes attention for tensors like ``query`` (..., heads, dim) without a window, and why, for records."""
    if not query.is_cuda:
        reason = cpu.refuses(query.dtype)
        path = "" if reason else native.module().cpu_path()
        return f"one document after the other in plain torch ({reason})" if reason else f"kernels for {path}"
    reason = cudnn.refuses(query.device, query.dtype, query.shape[-2], groups, query.shape[-1])
    return f"flash attention of torch (cuDNN: {reason})" if reason else "cuDNN"


def forward(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window: int | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention of q (n, heads, dim) to k and v (n, groups, dim), each token to those before it in its document.

    Parameters
    ----------
    bounds : (documents + 1,) int32
        Where documents begin, and the end of the last one: 0 to n.
    longest : int
        Tokens of the longest document.
    window : int or None
        Tokens that each sees, itself included.

    Returns
    -------
    (Tensor, tuple of Tensor)
        (n, heads, dim), and what ``backward`` wants besides.
    """
    if not q.is_cuda:
        if not cpu.refuses(q.dtype):
            return cpu.attention_forward(q, k, v, bounds, scale, window)
        return _by_document(q, k, v, bounds, scale, window), ()
    if _by_cudnn(q, k, window):
        return cudnn.forward(q, k, v, bounds, longest, scale)
    return flash.forward(q, k, v, bounds, longest, scale, window=window)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    kept: tuple[Tensor, ...],
    bounds: Tensor,
    longest: int,
    scale: float,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of ``forward``'s result; they may be parts of one tensor, as those are."""
    if q.is_cuda:
        if _by_cudnn(q, k, window):
            return cudnn.backward(grad, q, k, v, out, kept, longest, scale)
        return flash.backward(grad, q, k, v, out, kept, bounds, longest, scale, window=window)
    if kept:
        return cpu.attention_backward(grad, q, k, v, out, kept, bounds, scale, window)
    inputs = q, k, v = q.detach().requires_grad_(), k.detach().requires_grad_(), v.detach().requires_grad_()
    with torch.enable_grad():
        again = _by_document(q, k, v, bounds, scale, window)
    dq, dk, dv = torch.autograd.grad(again, inputs, grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


def _by_cudnn(q: Tensor, k: Tensor, window: int | None) -> bool:
    return window is None and not cudnn.refuses(q.device, q.dtype, q.shape[1], k.shape[1], q.shape[2])


def _by_document(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, window: int | None) -> Tensor:
    parts = []
    ends = bounds.tolist()
    for begin, end in itertools.pairwise(ends):
        one = tuple(t[begin:end].transpose(0, 1)[None] for t in (q, k, v))  # (1, heads, length, dim)
        mask = None
        if window is not None and window < end - begin:
            ones = torch.ones(end - begin, end - begin, dtype=torch.bool, device=q.device)
            mask = ones.tril().triu(1 - window)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(
            one[0], one[1], one[2], attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped
        )
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


class DocumentAttention(torch.autograd.Function):
    """``forward`` and ``backward`` as one differentiable function of q, k and v."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, window):
        out, kept = forward(q, k, v, bounds, longest, scale, window)
        ctx.save_for_backward(q, k, v, out, bounds, *kept)
        ctx.settings = longest, scale, window
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, bounds, *kept = ctx.saved_tensors
        found = backward(grad.contiguous(), q, k, v, out, tuple(kept), bounds, *ctx.settings)
        return (*found, None, None, None, None)
