"""The last linear layer and softmax cross-entropy in one: from
hidden states to the loss without ever holding all logits.

(N, V) logits and their gradient are the largest arrays of a language model's training step. Here a chunk of rows at a
time is turned into logits, by `fastft.ops.cross_entropy`'s kernels into their gradient in place, and by two more GEMMs
into gradients of the hidden states and of the weight: 6 N H V flops, no logit computed twice, and one chunk of logits
in memory (cf. Liger Kernel, arXiv 2410.10989, section 3.2, whose chunks of V / H-th of the rows make skinny GEMMs).
"""

import math
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from fastft.ops import backends, linear_cross_entropy_chunks, linear_cross_entropy_reference, native, triton
from fastft.ops.cross_entropy_check import check_options
from fastft.ops.cross_entropy_common import (
    CUDA,
    NOTHING,
    LossOptions,
    bad_row_op,
    compute_dtype,
    inverse_denominator,
    scaled_gradient,
    sum_rows,
)
from fastft.ops.cross_entropy_reference import is_bad, logsumexp
from fastft.ops.linear_cross_entropy_check import autocast, check
from fastft.ops.transforms import transformed

OP = "linear_cross_entropy"


class _Options(LossOptions, total=False):
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None
    class_weight: Tensor | None
    chunk_bytes: int | None


@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[_Options]
) -> Tensor: ...
@overload
def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, target: Tensor, *, return_lse: Literal[True], **options: Unpack[_Options]
) -> tuple[Tensor, Tensor]: ...
def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
    class_weight: Tensor | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    return_lse: bool = False,
    chunk_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """cross_entropy(hidden weight^T + bias, target, ...) for class indices,
    a superset of torch.nn.functional.linear_cross_entropy.

    hidden        (..., H), float32 or bfloat16 (float16, float64: reference backend only), any strides.
    weight        (V, H) in hidden's dtype; the layout of torch.nn.Linear.weight.
    target        (...), int64: class indices, or `ignore_index` anywhere. Ignored rows cost next to nothing on the CPU.
    bias          (V,) in hidden's dtype.
    low_rank      (hidden2, weight2), (..., R) and (V, R): adds hidden2 weight2^T to the logits. With LoRA (arXiv
                  2106.09685) on this layer hidden2 = scale * dropout(hidden) A^T and weight2 = B, and neither W + scale
                  B A nor its gradient is ever made.
    class_weight  (V,) floating: torch's `weight` of each class.
    chunk_bytes   most bytes of logits at a time, at least one row. Default on the CPU: 128 MiB but at least 512 rows,
                  and all rows at once where that takes less than a chunk and the float32 sum of weight's gradient,
                  which only chunks need. On CUDA: what the model of time and memory in linear_cross_entropy_plan.py
                  finds, with up to 2.5 GiB for logits and that sum.
    Everything else is as in `fastft.ops.cross_entropy`, which also says what the terms of the loss are.

    Returns the loss in float32 (float64 for float64 weights): 0-dim, or target's shape for "none"; with return_lse also
    the logsumexp of every row's scaled and capped logits, which keeps ignored rows in the computation.

    "mean" and "sum" compute in the forward those gradients that are needed, and the backward hands them over. "none"
    knows its upstream gradients only in the backward, which computes the logits again (8 N H V flops). Weight gradients
    are summed over chunks in float32 and rounded once. When all targets are ignored the loss and all gradients are 0.
    Only backend="reference", which holds all logits, is twice differentiable.

    Raises ValueError for shapes, dtypes or options that do not fit; IndexError on the CPU for a target outside [0, V).
    On CUDA such a row has loss nan and gradient 0, and `fastft.ops.bad_target(device)` names it. RuntimeError for a
    second backward through a graph that was not retained, and for a double backward.
    """
    ignore_index = NOTHING if ignore_index is None else ignore_index
    hidden2, weight2 = low_rank if low_rank is not None else (None, None)
    hidden, weight, bias, hidden2, weight2 = autocast(hidden, weight, bias, hidden2, weight2)
    check(hidden, weight, target, bias, hidden2, weight2, chunk_bytes)
    check_options(
        hidden, target, weight.shape[0], class_weight, token_weight, label_smoothing, reduction, softcap, "class_weight"
    )
    rows = hidden.reshape(-1, hidden.shape[-1])  # (N, H)
    rows2 = None if hidden2 is None else hidden2.reshape(-1, hidden2.shape[-1])  # (N, R)
    flat_target = target.reshape(-1).contiguous()  # (N,)
    dtype = compute_dtype(weight)
    if class_weight is not None:
        class_weight = class_weight.to(dtype).contiguous()
    if token_weight is not None:
        token_weight = token_weight.to(dtype).reshape(-1 if token_weight.ndim else ()).contiguous()
    device = hidden.device.type
    tensors = (rows, weight, bias, rows2, weight2)
    chosen = backends.select(OP, backend, device, (hidden.dtype,))
    scale = None
    if reduction == "mean":
        scale = inverse_denominator(flat_target, class_weight, token_weight, ignore_index, weight.shape[0], dtype)

    labels = (flat_target, class_weight, token_weight)
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0, logit_scale)
    with torch.autocast(device, enabled=False):  # inside, dtypes are as they are
        if chosen == "reference" or transformed(*tensors, flat_target):
            loss, lse = _reference(tensors, labels, scale, options, reduction, return_lse)
        elif reduction == "none":
            loss, lse = _rows_op(*tensors, *labels, *options, chunk_bytes, return_lse, chosen)
        else:
            needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
            loss, lse, *_ = _reduced_op(*tensors, *labels, scale, *options, chunk_bytes, return_lse, needs, chosen)
    if reduction == "none":
        loss = loss.reshape(target.shape)
    return (loss, lse.detach().reshape(target.shape)) if return_lse else loss


def _reference(tensors, labels, scale, options, reduction, return_lse) -> tuple[Tensor, Tensor]:
    """The reference, through torch's own autograd."""
    target, vocab = labels[0], tensors[1].shape[0]
    bad = is_bad(target, options[0], vocab)  # (N,)
    if not transformed(*tensors, target):  # whose rules a custom op does not have
        bad = bad & (bad_row_op(target, options[0], vocab) >= 0)  # used, or a compiler would leave the op out
    loss = backends.implementation(OP, "reference")(*tensors, *labels, *options)
    loss = torch.where(bad, math.nan, loss)
    lse = loss.new_empty(0)
    if return_lse:
        with torch.no_grad():
            lse = logsumexp(linear_cross_entropy_reference.logits(*tensors), *options[3:])
    if reduction != "none":
        loss = loss.sum() if scale is None else loss.sum() * scale
    return loss, lse


def _outputs(hidden: Tensor, want_lse: bool) -> tuple[Tensor, Tensor]:
    dtype, rows = compute_dtype(hidden), hidden.shape[0]
    return hidden.new_empty(rows, dtype=dtype), hidden.new_empty(rows if want_lse else 0, dtype=dtype)


def _or_empty(grads: list[Tensor | None], like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An op returns tensors only: (0,) in place of None."""
    hidden, weight, bias, hidden2, weight2 = (like.new_empty(0) if grad is None else grad for grad in grads)
    return hidden, weight, bias, hidden2, weight2


# ---- mean and sum: the forward computes the gradients ----------------------------------------------------------------


@torch.library.custom_op("fastft::linear_cross_entropy", mutates_args=())
def _reduced_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden2: Tensor | None,
    weight2: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk_bytes: int | None,
    want_lse: bool,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss (), lse (N,) or (0,), gradients of hidden, weight,
    bias, hidden2, weight2, each (0,) where `needs` says no).
    """
    loss, lse = _outputs(hidden, want_lse)
    bad_row_op(target, ignore_index, weight.shape[0])
    grads = backends.implementation(OP, backend)(
        hidden,
        weight,
        bias,
        hidden2,
        weight2,
        target,
        class_weight,
        token_weight,
        scale,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_bytes=chunk_bytes,
        loss=loss,
        lse=lse if want_lse else None,
        needs=needs,
    )
    return sum_rows(loss, scale), lse, *_or_empty(grads, hidden)


@_reduced_op.register_fake
def _reduced_fake(hidden, weight, bias, hidden2, weight2, *rest):
    *_, want_lse, needs, _backend = rest
    _, lse = _outputs(hidden, want_lse)
    tensors = (hidden, weight, bias, hidden2, weight2)
    grads = [t.new_empty(t.shape) if need else None for t, need in zip(tensors, needs, strict=True)]
    return lse.new_empty(()), lse, *_or_empty(grads, hidden)


def _reduced_setup(ctx, inputs, output):
    _, lse, *grads = output
    ctx.mark_non_differentiable(lse, *grads)
    ctx.set_materialize_grads(False)  # else autograd makes zeros as large as the gradients
    # Not save_for_backward: it would keep a second reference, and the optimizer's .grad would become a copy of each.
    ctx.grads = [grad.detach() if need else None for grad, need in zip(grads, inputs[-2], strict=True)]


def _reduced_backward(ctx, grad_loss, *_):
    if ctx.grads is None:
        raise RuntimeError("linear_cross_entropy: a second backward needs retain_graph=True in the first")
    grads = ctx.grads
    # Inside AOTAutograd nothing may be given away, and it asks once anyway.
    if type(grad_loss) is Tensor and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        ctx.grads = grads if torch._C._autograd._get_current_graph_task_keep_graph() else None
    return *(None if grad is None else scaled_gradient(grad, grad_loss, OP) for grad in grads), *[None] * 13


_reduced_op.register_autograd(_reduced_backward, setup_context=_reduced_setup)


# ---- none: the gradients wait for the backward, which brings a factor per row ----------------------------------------


@torch.library.custom_op("fastft::linear_cross_entropy_rows", mutates_args=())
def _rows_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden2: Tensor | None,
    weight2: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk_bytes: int | None,
    want_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss (N,), lse (N,) or (0,))."""
    loss, lse = _outputs(hidden, want_lse)
    bad_row_op(target, ignore_index, weight.shape[0])
    backends.implementation(OP, backend)(
        hidden,
        weight,
        bias,
        hidden2,
        weight2,
        target,
        class_weight,
        token_weight,
        None,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_bytes=chunk_bytes,
        loss=loss,
        lse=lse if want_lse else None,
        needs=[False] * 5,
    )
    return loss, lse


@_rows_op.register_fake
def _rows_fake(hidden, *rest):
    return _outputs(hidden, rest[-2])


@torch.library.custom_op("fastft::linear_cross_entropy_rows_backward", mutates_args=())
def _rows_grad_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden2: Tensor | None,
    weight2: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None,
    token_weight: Tensor | None,
    grad_loss: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk_bytes: int | None,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of sum_i grad_loss_i * loss_i: of hidden, weight,
    bias, hidden2, weight2, each (0,) where `needs` says no.
    """
    grads = backends.implementation(OP, backend)(
        hidden,
        weight,
        bias,
        hidden2,
        weight2,
        target,
        class_weight,
        token_weight,
        grad_loss.contiguous(),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_bytes=chunk_bytes,
        loss=None,
        lse=None,
        needs=needs,
    )
    return _or_empty(grads, hidden)


@_rows_grad_op.register_fake
def _rows_grad_fake(*arguments):
    needs = arguments[-2]
    return _or_empty(
        [t.new_empty(t.shape) if need else None for t, need in zip(arguments[:5], needs, strict=True)], arguments[0]
    )


def _rows_setup(ctx, inputs, output):
    *tensors, ignore_index, label_smoothing, z_loss, softcap, logit_scale, chunk_bytes, _want_lse, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors)
    ctx.options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale, chunk_bytes)
    ctx.backend = backend


def _rows_backward(ctx, grad_loss, _grad_lse):
    needs = list(ctx.needs_input_grad[:5])
    grads = _rows_grad_op(*ctx.saved_tensors, grad_loss, *ctx.options, needs, ctx.backend)
    return *(grad if need else None for grad, need in zip(grads, needs, strict=True)), *[None] * 11


_rows_op.register_autograd(_rows_backward, setup_context=_rows_setup)


for _backend, _refuses, _automatic_on in (("native", native.refuses, None), ("triton", triton.refuses, CUDA)):
    _load = linear_cross_entropy_chunks.implementation(_backend)
    backends.register(OP, _backend, load=_load, refuses=_refuses, automatic_on=_automatic_on)
backends.register(OP, "reference", load=lambda: linear_cross_entropy_reference.loss_per_row, refuses=lambda *_: "")
