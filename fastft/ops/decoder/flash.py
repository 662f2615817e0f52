"""The flash attention that torch carries, over rows of any length that lie one after the other: the operators behind
`torch.nn.attention.varlen`, called as they are, for the signature of that module changes from version to version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bounds: Tensor,
    longest: int,
    scale: float,
    *,
    window: int | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `fastft.ops.decoder.attention.forward`, on a GPU, bf16 or fp16; also where each token sees all of its row, and
    with dropout of the weights.
    """
    out, *rest = torch.ops.aten._flash_attention_forward(
        q, k, v, bounds, bounds, longest, longest, dropout, causal, False, scale=scale, **_window(window)
    )
    return out, tuple(rest[:3])  # lse, random state, and one more of it


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
    *,
    window: int | None = None,
    causal: bool = True,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v from that of ``forward``'s result, with what it kept and the same settings."""
    lse, state, more = kept
    same = bounds, bounds, longest, longest, dropout, causal, state, more
    return torch.ops.aten._flash_attention_backward(grad, q, k, v, out, lse, *same, scale=scale, **_window(window))


def _window(window: int | None) -> dict[str, Any]:
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def heads_side_by_side(t: Tensor) -> Tensor:
    """(n, heads, dim) whose heads follow each other in memory; tokens may lie further apart."""
    return t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous()
