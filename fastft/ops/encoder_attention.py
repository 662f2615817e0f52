"""Attention of rows of any length that lie one after the other, each token to all of its row: what an encoder computes
without padding.

On a GPU it is the flash attention that torch carries, with dropout; elsewhere torch's attention of one row after the
other, neighbours of one length together.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.ops.decoder import flash


def attention(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, dropout: float) -> Tensor:
    """Attention of q to k and v, all (n, heads, dim) of one dtype, on a GPU bf16 or fp16; differentiable.

    Parameters
    ----------
    bounds : (rows + 1,) int32
        Where rows begin, and the end of the last one: 0 to n.
    longest : int
        Tokens of the longest row.
    dropout : float
        Probability that a weight is dropped, the others are scaled up.

    Returns
    -------
    Tensor
        (n, heads, dim)
    """
    if q.is_cuda:
        return _Flash.apply(q, k, v, bounds, longest, scale, dropout)
    return _by_row(q, k, v, bounds, scale, dropout)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float, dropout: float):
        out, kept = flash.forward(q, k, v, bounds, longest, scale, causal=False, dropout=dropout)
        ctx.save_for_backward(q, k, v, out, bounds, *kept)
        ctx.settings = longest, scale, dropout
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, bounds, *kept = ctx.saved_tensors
        longest, scale, dropout = ctx.settings
        given = grad.contiguous(), q, k, v, out, tuple(kept), bounds, longest, scale
        return (*flash.backward(*given, causal=False, dropout=dropout), None, None, None, None)


def _by_row(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float, dropout: float) -> Tensor:
    lengths = [end - begin for begin, end in itertools.pairwise(bounds.tolist())]
    runs = [(length, len(list(same))) for length, same in itertools.groupby(lengths)]
    sizes = [length * rows for length, rows in runs]
    outs = []
    for (length, rows), *parts in zip(runs, *(t.split(sizes) for t in (q, k, v)), strict=True):
        one, other, third = (part.unflatten(0, (rows, length)).transpose(1, 2) for part in parts)
        out = F.scaled_dot_product_attention(one, other, third, dropout_p=dropout, scale=scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)
