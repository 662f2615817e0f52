"""Softmax cross-entropy over (N, V) logits: loss and gradient in one pass over the logits.

torch.nn.functional.cross_entropy holds the logits in float32, their log-softmax and its gradient, and walks over them
about nine times. Here the forward writes the gradient at once, already scaled by 1 / denominator in float32 before it
is rounded, and the backward hands it over. The maths is in fastft/_C.pyi.
"""

import math
from collections.abc import Callable
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from fastft.ops import backends, cross_entropy_check, cross_entropy_reference, native, triton
from fastft.ops.cross_entropy_autograd import InPlace, reduced_op, rows_op
from fastft.ops.cross_entropy_common import (
    CUDA,
    NOTHING,
    LossOptions,
    bad_row_op,
    bad_target,
    compute_dtype,
    inverse_denominator,
)
from fastft.ops.transforms import transformed

__all__ = ["bad_target", "cross_entropy"]


class _Options(LossOptions, total=False):
    weight: Tensor | None
    inplace: bool


@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[_Options]
) -> Tensor: ...
@overload
def cross_entropy(
    logits: Tensor, target: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...
def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    return_lse: bool = False,
    inplace: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Superset of torch.nn.functional.cross_entropy for class indices; same values where both are defined.

    logits        (..., V), float32 or bfloat16 (float16, float64: reference backend only). Rows are read where they lie
                  when the last dimension is contiguous and the leading ones flatten to a view; otherwise a contiguous
                  copy is made.
    target        (...), int64: class indices, or `ignore_index` anywhere (None: nothing is ignored).
    weight        (V,) floating: weight of each class.
    reduction     "mean" divides by the sum of token_weight * weight[target] over the targets that are not ignored;
                  "sum"; "none".
    z_loss        adds z_loss * lse^2 to each row (PaLM, arXiv 2204.02311, section 5).
    softcap       logits become softcap * tanh(logit_scale * logits / softcap) (Gemma 2, arXiv 2408.00118, section 2).
    token_weight  (...) floating, a factor for each row's loss; or a 0-dim tensor for all. With reduction="sum" and
                  token_weight = 1 / (valid tokens of the whole global batch) the loss needs no factor afterwards, so
                  the gradient is scaled once, in float32, before it is rounded to bfloat16.
    return_lse    also return the logsumexp of the scaled and capped logits, (...) float32, not differentiable.
    inplace       the storage of `logits` becomes the gradient, which saves one (N, V) array. Not for reduction="none".

    Returns the loss in float32 (float64 for float64 logits): 0-dim, or target's shape for "none". When all targets are
    ignored the loss is 0 and so is the gradient (torch: nan). `weight` and `token_weight` get no gradient. Only
    backend="reference" is twice differentiable. When logits need no gradient nothing but the loss is computed.

    Raises ValueError for shapes, dtypes or options that do not fit; IndexError on the CPU for a target outside [0, V).
    On CUDA, where looking would stall the stream, such a row has loss nan and gradient 0, and `bad_target(device)`
    names it.
    """
    cross_entropy_check.check(logits, target, weight, token_weight, label_smoothing, reduction, softcap, inplace)
    ignore_index = NOTHING if ignore_index is None else ignore_index
    vocab = logits.shape[-1]
    rows = logits.reshape(-1, vocab)  # (N, V)
    flat_target = target.reshape(-1).contiguous()  # (N,)
    if weight is not None:
        weight = weight.to(compute_dtype(logits)).contiguous()
    if token_weight is not None:
        token_weight = token_weight.to(compute_dtype(logits)).reshape(-1 if token_weight.ndim else ()).contiguous()
    chosen = backends.select("cross_entropy", backend, logits.device.type, (logits.dtype,))
    through_torch = transformed(logits, target)
    scale = None
    if reduction == "mean":
        scale = inverse_denominator(flat_target, weight, token_weight, ignore_index, vocab, compute_dtype(logits))

    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0, logit_scale)
    if through_torch or (chosen == "reference" and not inplace):
        loss, lse = _reference(rows, flat_target, weight, token_weight, scale, options, reduction, return_lse)
    elif reduction == "none":
        loss, lse = rows_op(rows, flat_target, weight, token_weight, *options, return_lse, chosen)
    elif inplace:
        loss, lse = InPlace.apply(rows, flat_target, weight, token_weight, scale, options, return_lse, chosen)
    else:
        want_grad = torch.is_grad_enabled() and logits.requires_grad
        loss, lse, _ = reduced_op(
            rows, flat_target, weight, token_weight, scale, *options, return_lse, want_grad, chosen
        )
    if reduction == "none":
        loss = loss.reshape(target.shape)
    return (loss, lse.detach().reshape(target.shape)) if return_lse else loss


def _reference(rows, target, weight, token_weight, scale, options, reduction, return_lse) -> tuple[Tensor, Tensor]:
    """The reference, through torch's own autograd."""
    ignore_index, vocab = options[0], rows.shape[1]
    bad = cross_entropy_reference.is_bad(target, ignore_index, vocab)  # (N,)
    if not transformed(rows, target):  # whose rules a custom op does not have
        bad = bad & (bad_row_op(target, ignore_index, vocab) >= 0)  # used, or a compiler would leave the op out
    loss = cross_entropy_reference.loss_per_row(rows, target, weight, token_weight, *options)
    loss = torch.where(bad, math.nan, loss)
    lse = cross_entropy_reference.logsumexp(rows.detach(), *options[3:]) if return_lse else loss.new_empty(0)
    if reduction != "none":
        loss = loss.sum() if scale is None else loss.sum() * scale
    return loss, lse


_LOAD_REFERENCE: dict[str, Callable[[], Callable]] = {
    "cross_entropy": lambda: cross_entropy_reference.cross_entropy,
    "scale": lambda: cross_entropy_reference.scale,
}
backends.register("cross_entropy", "native", load=native.loader("cross_entropy"), refuses=native.refuses)
for _op in ("cross_entropy", "scale"):
    backends.register(
        _op, "triton", load=triton.loader("cross_entropy", _op), refuses=triton.refuses, automatic_on=CUDA
    )
    backends.register(_op, "reference", load=_LOAD_REFERENCE[_op], refuses=lambda *_: "")
