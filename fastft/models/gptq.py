"""Rounding a linear layer's weight to few values so that its outputs change least, and not its weights.

What is known of the layer's inputs is their second moment H = E[x xᵀ], (in, in): for an error E of the weight,
(out, in), the mean square error of the outputs is the trace of E H Eᵀ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean of H's diagonal, added to it: inputs that the rows do not have keep some weight
COLUMNS = 128  # whose errors are fed into the columns behind them at once
SWEEPS = 3  # of the descent, each time
# Of a block's largest weight: a smaller scale rounds many small weights less and cuts a few large ones off.
SHRINKS = tuple(1 - 0.02 * i for i in range(16))
RIDGES = (0.01, 0.1, 1.0)  # of the mean of H's diagonal, of which one is added to it before it is inverted


class Inputs(NamedTuple):
    """What is known of a layer's inputs x over some tokens."""

    tokens: int
    moment: Tensor  # (in, in): E[x xᵀ]
    drift: Tensor | None = None  # (in, in): E[(p - x) xᵀ], p: what the layer is given in the model as it was
    behind: Tensor | None = None  # (out, in): E[(r - s) xᵀ], s: what the output is added to, r: the same in that model


def joined(halves: list[Inputs]) -> Inputs:
    """Of all their tokens."""
    tokens = sum(half.tokens for half in halves)
    shares = [half.tokens / max(1, tokens) for half in halves]

    def mean(parts: list[Any]) -> Any:
        known = all(part is not None for part in parts)
        return sum(share * part for share, part in zip(shares, parts, strict=True)) if known else None

    return Inputs(tokens, *(mean([half[i] for half in halves]) for i in (1, 2, 3)))


def recovered(weight: Tensor, halves: list[Inputs], every: Inputs) -> Tensor:
    """The weight that makes of the layer's inputs what ``weight`` makes of those of the model as it was, by least
    squares: what the layers before it lost is made good as far as inputs tell (GPTAQ: Li et al. 2025, arXiv
    2504.02692), and with it what the output is added to has lost.

    Each half of the rows says whether what the other asks for helps: with the ridge that helps most, or not at all.

    ``every``: ``halves``, joined.
    """
    if every.drift is None or not all(half.tokens for half in halves):
        return weight
    best, least = None, 0.0
    for ridge in RIDGES:
        gain = 0.0
        for known, other in (halves, halves[::-1]):
            change = _change(weight, known, ridge, torch.float32)
            gain += ((change @ other.moment - 2 * _wanted(weight, other)) * change).sum().item() * other.tokens
        if gain < least:
            best, least = ridge, gain
    return weight if best is None else weight + _change(weight, every, best, torch.float64)


def _change(weight: Tensor, inputs: Inputs, ridge: float, dtype: torch.dtype) -> Tensor:
    """(out, in): D with D x near to W (p - x), and to r - s."""
    factor = torch.linalg.cholesky(_damped(inputs.moment, ridge, dtype))
    return torch.cholesky_solve(_wanted(weight, inputs).T.to(dtype), factor).T.to(weight)


def _wanted(weight: Tensor, inputs: Inputs) -> Tensor:
    """(out, in): the second moment of what is to be made good and of the inputs."""
    assert inputs.drift is not None
    wanted = weight @ inputs.drift
    return wanted if inputs.behind is None else wanted + inputs.behind


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Index of the nearest of the sorted ``values``."""
    return torch.bucketize(x, (values[1:] + values[:-1]) / 2)


def in_blocks(weight: Tensor, block: int) -> Tensor:
    """(blocks, block): neighbors in memory, row by row, which share a scale; zeros behind the last."""
    flat = weight.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)


def scales(weight: Tensor, moment: Tensor, values: Tensor, block: int) -> Tensor:
    """(blocks,) of SHRINKS of each block's largest weight the one with the least error by the diagonal of H."""
    blocks = in_blocks(weight, block)
    cost = in_blocks(moment.diagonal().expand_as(weight), block)
    largest = blocks.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for shrink in SHRINKS:
        scale = shrink * largest[:, None]
        error = ((values[nearest(blocks / scale, values)] * scale - blocks).square_() * cost).sum(1)
        best = torch.where(error < least, scale[:, 0], best)
        least = torch.minimum(error, least)
    return best


def rounded(weight: Tensor, moment: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """Indices into ``values``, (out, in) int64, so that ``values[indices] * scale`` stands for the weight.

    GPTQ (Frantar et al. 2022, arXiv 2210.17323): columns are rounded one after the other, those with the largest inputs
    first, and the error of each goes into those that are not rounded yet.

    Parameters
    ----------
    weight, scale : (out, in) float32
    moment : (in, in)
        Second moment of the inputs.
    values : (n,) sorted
    """
    n = weight.shape[1]
    order = moment.diagonal().argsort(descending=True, stable=True)
    factor = torch.linalg.cholesky(_damped(moment, DAMPING, torch.float64)[order][:, order])
    factor = torch.cholesky_inverse(factor)
    factor = torch.linalg.cholesky(factor, upper=True).to(weight)  # row i: what an error of column i asks of others
    rest = weight.T[order].contiguous()  # (in, out): a column is a row in memory
    scale = scale.T[order].contiguous()
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).tiny, scale)
    found = torch.empty(rest.shape, dtype=torch.int64, device=rest.device)
    for first in range(0, n, COLUMNS):
        last = min(first + COLUMNS, n)
        errors = torch.empty_like(rest[first:last])
        for i in range(first, last):
            found[i] = nearest(rest[i] / scale[i], values)
            errors[i - first] = (rest[i] - values[found[i]] * scale[i]) / factor[i, i]
            rest[i + 1 : last].addr_(factor[i, i + 1 : last], errors[i - first], alpha=-1)
        rest[last:].addmm_(factor[first:last, last:].T, errors, alpha=-1)
    return found[order.argsort()].T.contiguous()


def descended(weight: Tensor, moment: Tensor, scale: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Better indices, (out, in) int64, than those that ``rounded`` found: column by column, again and again, each
    weight takes the value that is best beside all others as they are now (QuantEase: Behdin et al. 2023, arXiv
    2309.01885).
    """
    n = weight.shape[1]
    h = _damped(moment, DAMPING, torch.float32)
    scale = scale.T.contiguous()
    scale = torch.where(scale == 0, torch.finfo(scale.dtype).tiny, scale)
    found = indices.T.contiguous()  # (in, out): a column is a row in memory
    at = values[found] * scale
    pull = h @ (weight.T - at)  # (in, out): half of how fast the error falls, as each weight grows
    for first in [*range(0, n, COLUMNS)] * SWEEPS:
        last = min(first + COLUMNS, n)
        own, block = h[first:last, first:last], pull[first:last].clone()
        moved = torch.empty_like(block)
        for i in range(first, last):
            best = at[i] + block[i - first] / own[i - first, i - first]
            found[i] = nearest(best / scale[i], values)
            moved[i - first] = values[found[i]] * scale[i] - at[i]
            at[i] += moved[i - first]
            block.addr_(own[:, i - first], moved[i - first], alpha=-1)
        pull.addmm_(h[:, first:last], moved, alpha=-1)
    return found.T.contiguous()


def refitted(weight: Tensor, moment: Tensor, scale: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    """Better scales, (blocks,), for these indices: one after the other in each row, by least squares beside all others
    as they are now. Those of blocks that go on from row to row stay.
    """
    rows, n = weight.shape
    block = weight.numel() // len(scale)
    if n % block or block * len(scale) != weight.numel():
        return scale
    h = _damped(moment, DAMPING, torch.float32)
    numbers = values[indices]
    scale = scale.view(rows, -1).clone()
    pull = (weight - numbers * scale.repeat_interleave(block, 1)) @ h
    for b in range(n // block):
        here = slice(b * block, (b + 1) * block)
        own = numbers[:, here]
        bend = ((own @ h[here, here]) * own).sum(1)
        step = torch.where(bend > 0, (own * pull[:, here]).sum(1) / bend, 0.0)
        step = torch.maximum(step, -scale[:, b])
        scale[:, b] += step
        pull.addmm_(step[:, None] * own, h[here], alpha=-1)
    return scale.flatten()


def _damped(moment: Tensor, ridge: float, dtype: torch.dtype) -> Tensor:
    """A copy with some of the mean of its diagonal added to that."""
    h = moment.to(dtype, copy=True)
    h.diagonal().add_(ridge * h.diagonal().mean().clamp_min(1e-30))
    return h
