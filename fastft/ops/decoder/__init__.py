"""A decoder layer as one function with one backward.

    h = x + attention(rotate(norm(x) Wq), rotate(norm(x) Wk), norm(x) Wv) Wo
    y = h + (silu(norm(h) Wgate) * norm(h) Wup) Wdown

This is the layer of Llama, Mistral, Qwen2 and those made after them. Taken apart into torch's operators it reads and
writes memory some forty times beside its matrix products, keeps what the backward could compute again, and costs a
hundred kernel launches. Here norms, rotation and gate are one pass each; query, key and value come from one product
where their weights lie side by side in memory, so do gate and up; documents attend within themselves; and for the
backward x, qkv, the attention's output, h, gate and up are kept, and three numbers a row.

On a CPU without instructions for bf16 a layer of bf16 weights computes in float32: it widens them for its forward, and
again for its backward, and what goes in and comes out is bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastft.ops.cpu import widened, widens
from fastft.ops.decoder import attention, cpu, reference


@dataclass(frozen=True)
class Shape:
    """What a layer's weights do not say.

    Attributes
    ----------
    heads, groups, dim : int
        Heads of queries, heads of keys and values, elements of a head.
    scale : float
        Factor of the attention's logits.
    eps : float
        Of both norms.
    window : int or None
        Tokens that each token sees, itself included.
    """

    heads: int
    groups: int
    dim: int
    scale: float
    eps: float
    window: int | None = None


@dataclass
class Documents:
    """How the tokens of a batch lie: rows one after the other, documents in them, and their rotation.

    Attributes
    ----------
    bounds : (documents + 1,) int32
        Where each document begins; the last is the number of tokens.
    longest : int
        Tokens of the longest document.
    cos, sin : (tokens or a divisor of it, dim)
        Rotation of each token, both halves equal; rows repeat.
    """

    bounds: Tensor
    longest: int
    cos: Tensor
    sin: Tensor


# In the order of decoder_layer's weights; biases may be None.
WEIGHTS = ("norm1", "q", "k", "v", "q_bias", "k_bias", "v_bias", "o", "norm2", "gate", "up", "down")


def decoder_layer(x: Tensor, documents: Documents, shape: Shape, weights: tuple[Tensor | None, ...]) -> Tensor:
    """A decoder layer, differentiable once.

    Parameters
    ----------
    x : (..., d)
        Hidden states; all but the last dimension together are the tokens of ``documents``.
    weights : tuple
        As ``WEIGHTS`` names them: norms (d,), q (heads * dim, d), k and v (groups * dim, d), o (d, heads * dim), gate
        and up (f, d), down (d, f), biases of q, k and v or None. All of x's dtype.

    Returns
    -------
    Tensor
        Of x's shape and dtype.
    """
    return _DecoderLayer.apply(x, documents, shape, *weights)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32, of x's dtype; differentiable once."""
    return _RMSNorm.apply(x, weight, eps)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape and dtype, in float32, of their dtype; differentiable once."""
    return _Gated.apply(gate, up)


def kernels(x: Tensor) -> ModuleType:
    """The element-wise kernels for tensors like x: Triton's on a GPU, fastft._C's on a CPU, or else plain torch."""
    if x.is_cuda:
        from fastft.ops.triton import decoder

        return decoder
    return reference if cpu.refuses(x.dtype) else cpu


def side_by_side(tensors: tuple[Tensor, ...]) -> Tensor | None:
    """The same memory as one tensor, stacked along the first dimension, where they lie one after the other; or None."""
    first = tensors[0]
    end = first.storage_offset()
    for tensor in tensors:
        if (
            not tensor.is_contiguous()
            or tensor.storage_offset() != end
            or tensor.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or tensor.shape[1:] != first.shape[1:]
        ):
            return None
        end += tensor.numel()
    rows = sum(tensor.shape[0] for tensor in tensors)
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def _products(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor | None, ...] = ()) -> Tensor:
    """x W^T (+ b) of several weights, side by side: (n, sum of their rows)."""
    given = tuple(b for b in biases if b is not None)
    whole = side_by_side(weights)
    if whole is not None and not given:
        return torch.mm(x, whole.t())
    bias = side_by_side(given) if given else None
    if whole is not None and bias is not None:
        return torch.addmm(bias, x, whole.t())
    out = x.new_empty(x.shape[0], sum(w.shape[0] for w in weights))
    at = 0
    for i, w in enumerate(weights):
        part = out[:, at : at + w.shape[0]]
        if given:
            torch.addmm(given[i], x, w.t(), out=part)
        else:
            torch.mm(x, w.t(), out=part)
        at += w.shape[0]
    return out


def _input_gradient(grad: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """grad W, summed over several weights whose outputs lie side by side in grad (n, sum of their rows)."""
    whole = side_by_side(weights)
    if whole is not None:
        return torch.mm(grad, whole)
    parts = grad.split([w.shape[0] for w in weights], 1)
    out = torch.mm(parts[0], weights[0])
    for part, w in zip(parts[1:], weights[1:], strict=True):
        out.addmm_(part, w)
    return out


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, documents: Documents, shape: Shape, *weights: Any) -> Tensor:
        given = x.reshape(-1, x.shape[-1])
        rows, n1, wq, wk, wv, bq, bk, bv, wo, n2, wg, wu, wd = _computed_in(given, weights)
        ops = kernels(rows)
        _, y, r1 = ops.rms_forward(rows, None, n1, shape.eps)
        qkv = _products(y, (wq, wk, wv), (bq, bk, bv))
        ops.rope_forward(qkv, documents.cos, documents.sin, shape.heads + shape.groups, shape.dim)
        q, k, v = _heads(qkv, shape)
        o, kept = attention.forward(q, k, v, documents.bounds, documents.longest, shape.scale, shape.window)
        t = torch.mm(o.flatten(1), wo.t())
        h, y, r2 = ops.rms_forward(rows, t, n2, shape.eps)
        del t
        gu = _products(y, (wg, wu))
        del y
        out = torch.addmm(h, ops.swiglu_forward(*gu.chunk(2, 1)), wd.t())
        ctx.save_for_backward(
            given, r1, qkv, o, h, r2, gu, documents.bounds, documents.cos, documents.sin, *weights, *kept
        )
        ctx.settings = documents.longest, shape, x.shape
        return out.to(x.dtype).view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        if getattr(ctx, "used", False):  # kernels write over what was kept
            raise RuntimeError("a decoder layer's backward was run twice: it keeps nothing for that")
        ctx.used = True
        rows, r1, qkv, o, h, r2, gu, bounds, cos, sin, *rest = ctx.saved_tensors
        weights, kept = rest[: len(WEIGHTS)], tuple(rest[len(WEIGHTS) :])
        dtype = rows.dtype
        rows, n1, wq, wk, wv, *_, wo, n2, wg, wu, wd = _computed_in(rows, weights)
        longest, shape, given = ctx.settings
        need = dict(zip(WEIGHTS, ctx.needs_input_grad[3:], strict=True))
        ops = kernels(rows)
        dout = dout.reshape(rows.shape).to(rows.dtype).contiguous()
        grads: dict[str, Tensor | None] = dict.fromkeys(WEIGHTS)

        a = torch.mm(dout, wd)
        # In place: a becomes the activation, gu the gradients of gate and up.
        ops.swiglu_backward(*gu.chunk(2, 1), a, in_place=True)
        if need["down"]:
            grads["down"] = torch.mm(dout.t(), a)
        del a
        dy = _input_gradient(gu, (wg, wu))
        y = torch.empty_like(rows)
        dh, d = ops.rms_backward(dy, h, n2, r2, extra=dout, y=y)
        if need["norm2"]:
            grads["norm2"] = d
        if need["gate"] or need["up"]:
            grads["gate"], grads["up"] = torch.mm(gu.t(), y).split([wg.shape[0], wu.shape[0]])
        do = torch.mm(dh, wo)
        if need["o"]:
            grads["o"] = torch.mm(dh.t(), o.flatten(1))
        q, k, v = _heads(qkv, shape)
        parts = attention.backward(do.view_as(o), q, k, v, o, kept, bounds, longest, shape.scale, shape.window)
        dqkv = _whole(*parts)
        if dqkv is None:
            dqkv = ops.rope_backward(*parts, cos, sin)
        else:
            ops.rope_forward(dqkv, cos, sin, shape.heads + shape.groups, shape.dim, back=True)
        del do
        dy = _input_gradient(dqkv, (wq, wk, wv))
        dx, d = ops.rms_backward(dy, rows, n1, r1, extra=dh, y=y, out=dh)
        if need["norm1"]:
            grads["norm1"] = d
        sizes = [w.shape[0] for w in (wq, wk, wv)]
        if need["q"] or need["k"] or need["v"]:
            grads["q"], grads["k"], grads["v"] = torch.mm(dqkv.t(), y).split(sizes)
        if need["q_bias"] or need["k_bias"] or need["v_bias"]:
            grads["q_bias"], grads["k_bias"], grads["v_bias"] = dqkv.sum(0).split(sizes)
        found = (grads[name] if need[name] else None for name in WEIGHTS)
        return (dx.to(dtype).view(given), None, None, *(None if g is None else g.to(dtype) for g in found))


def _computed_in(rows: Tensor, weights: Any) -> tuple:
    """Rows and weights as the layer computes with them: as they are, or in float32 on a CPU that has no bf16."""
    if not widens(rows):
        return (rows, *weights)
    n1, wq, wk, wv, bq, bk, bv, wo, n2, wg, wu, wd = weights
    (n1, n2), (wo,), (wd,) = widened((n1, n2)), widened((wo,)), widened((wd,))
    return (rows.float(), n1, *widened((wq, wk, wv)), *widened((bq, bk, bv)), wo, n2, *widened((wg, wu)), wd)


def _heads(qkv: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Views (n, heads, dim) of query, key and value."""
    sizes = [shape.heads * shape.dim, shape.groups * shape.dim, shape.groups * shape.dim]
    q, k, v = (part.unflatten(1, (-1, shape.dim)) for part in qkv.split(sizes, 1))
    return q, k, v


def _whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor | None:
    """The tensor (n, all elements of a token) whose parts these (n, heads, dim) are, side by side; None: no such."""
    width = sum(part.shape[1] * part.shape[2] for part in (q, k, v))
    at = q.storage_offset()
    for part in (q, k, v):
        same = part.untyped_storage().data_ptr() == q.untyped_storage().data_ptr()
        if not same or part.stride() != (width, part.shape[2], 1) or part.storage_offset() != at:
            return None
        at += part.shape[1] * part.shape[2]
    return q.as_strided((q.shape[0], width), (width, 1), q.storage_offset())


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        _, y, rstd = kernels(x).rms_forward(rows, None, weight, eps)
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        rows, weight, rstd = ctx.saved_tensors
        dx, dweight = kernels(rows).rms_backward(dy.reshape(rows.shape).contiguous(), rows, weight, rstd)
        return dx.view(dy.shape), dweight.to(weight.dtype), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        rows = [t.reshape(-1, t.shape[-1]).contiguous() for t in (gate, up)]
        ctx.save_for_backward(*rows)
        return kernels(gate).swiglu_forward(*rows).view(gate.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, da: Tensor) -> Any:
        gate, up = ctx.saved_tensors
        grads = kernels(gate).swiglu_backward(gate, up, da.reshape(gate.shape).contiguous())
        return tuple(grad.view(da.shape) for grad in grads)
