"""Softmax cross-entropy over (N, V) logits: loss and gradient in one pass over the logits.

torch.nn.functional.cross_entropy holds the logits in float32, their log-softmax and its gradient, and walks over them
about nine times. Here the forward writes the gradient at once, already scaled by 1 / denominator in float32 before it
is rounded, and the backward hands it over. The maths is in fastft/_C.pyi.
"""

import math

import torch
from torch import Tensor

from fastft.ops import backends, cross_entropy_check, cross_entropy_reference, native, triton

_flags: dict[torch.device, Tensor] = {}  # CUDA device -> () int64, the last row whose target was out of range, or -1


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
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
    target        (...), int64: class indices, or `ignore_index` anywhere.
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
    vocab = logits.shape[-1]
    rows = logits.reshape(-1, vocab)  # (N, V)
    flat_target = target.reshape(-1).contiguous()  # (N,)
    if weight is not None:
        weight = weight.to(_compute_dtype(logits)).contiguous()
    if token_weight is not None:
        token_weight = token_weight.to(_compute_dtype(logits)).reshape(-1 if token_weight.ndim else ()).contiguous()
    chosen = backends.select("cross_entropy", backend, logits.device.type, (logits.dtype,))
    scale = None
    if reduction == "mean":
        scale = _inverse_denominator(flat_target, weight, token_weight, ignore_index, vocab, _compute_dtype(logits))

    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0, logit_scale)
    if chosen == "reference" and not inplace:
        loss, lse = _reference(rows, flat_target, weight, token_weight, scale, options, reduction, return_lse)
    elif reduction == "none":
        loss, lse = _rows_op(rows, flat_target, weight, token_weight, *options, return_lse, chosen)
    elif inplace:
        loss, lse = _InPlace.apply(rows, flat_target, weight, token_weight, scale, options, return_lse, chosen)
    else:
        want_grad = torch.is_grad_enabled() and logits.requires_grad
        loss, lse, _ = _reduced_op(
            rows, flat_target, weight, token_weight, scale, *options, return_lse, want_grad, chosen
        )
    if reduction == "none":
        loss = loss.reshape(target.shape)
    return (loss, lse.detach().reshape(target.shape)) if return_lse else loss


def bad_target(device: torch.device | str) -> int:
    """Row of the last out-of-range target that was met on this CUDA device, -1 when there was none.

    Waits for the device.

    Ask for it when a loss is nan; the answer is cleared.
    """
    device = torch.empty(0, device=device).device  # "cuda" -> cuda:0
    flag = _flags.pop(device, None)
    return -1 if flag is None else int(flag.item())


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _inverse_denominator(target, weight, token_weight, ignore_index, vocab, dtype) -> Tensor:
    """1 / sum of the weights of the targets that count, 0-dim; 0 when none counts."""
    valid = target != ignore_index
    per_token = valid.to(dtype)
    if weight is not None:
        # Clamped because an out-of-range target is reported by the kernel, with its position.
        per_token = per_token * weight[target.clamp(0, vocab - 1)]
    if token_weight is not None:
        per_token = per_token * token_weight
    total = per_token.sum(dtype=torch.float64)
    return torch.where(total == 0, 0.0, 1.0 / total).to(dtype)


def _reference(rows, target, weight, token_weight, scale, options, reduction, return_lse) -> tuple[Tensor, Tensor]:
    """The reference, through torch's own autograd."""
    ignore_index = options[0]
    bad_row = _bad_row_op(target, ignore_index, rows.shape[1])
    loss = cross_entropy_reference.loss_per_row(rows, target, weight, token_weight, *options)
    lse = cross_entropy_reference.logsumexp(rows.detach(), *options[3:]) if return_lse else loss.new_empty(0)
    if reduction != "none":
        loss = loss.sum() if scale is None else loss.sum() * scale
    return torch.where(bad_row >= 0, math.nan, loss), lse


def _run(backend, logits, target, weight, token_weight, grad_scale, options, *, loss, lse, grad) -> None:
    """Call a backend's kernel on prepared tensors, then look at its out-of-range flag."""
    ignore_index, label_smoothing, z_loss, softcap, logit_scale = options
    bad_row = torch.full((), -1, dtype=torch.int64, device=logits.device)
    if logits.shape[0] == 0:
        return
    backends.implementation("cross_entropy", backend)(
        logits,
        target,
        weight,
        token_weight,
        grad_scale,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        softcap=softcap,
        logit_scale=logit_scale,
        loss=loss,
        lse=lse,
        grad=grad,
        bad_row=bad_row,
    )
    _report(bad_row, target, ignore_index, logits.shape[1])


def _report(bad_row: Tensor, target: Tensor, ignore_index: int, vocab: int) -> None:
    if bad_row.device.type == "cpu":
        row = int(bad_row.item())
        if row >= 0:
            raise IndexError(
                f"target {int(target[row])} at position {row} is neither in [0, {vocab}) "
                f"nor ignore_index ({ignore_index})"
            )
    elif bad_row.device in _flags:
        torch.maximum(_flags[bad_row.device], bad_row, out=_flags[bad_row.device])
    else:
        _flags[bad_row.device] = bad_row


def _contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def _outputs(logits: Tensor, want_lse: bool) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(logits)
    return logits.new_empty(logits.shape[0], dtype=dtype), logits.new_empty(
        logits.shape[0] if want_lse else 0, dtype=dtype
    )


def _total(row_loss: Tensor, scale: Tensor | None) -> Tensor:
    # float64 because 32k terms in float32 would lose what the kernel kept; it is N numbers, not N * V.
    total = row_loss.sum(dtype=torch.float64)
    return (total if scale is None else total * scale).to(row_loss.dtype)


# ---- mean and sum: the forward computes the gradient -----------------------------------------------------------------


@torch.library.custom_op("fastft::cross_entropy", mutates_args=())
def _reduced_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    want_lse: bool,
    want_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss (), lse (N,) or (0,), gradient of the loss (N, V) or (0,))."""
    loss, lse = _outputs(logits, want_lse)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if want_grad else logits.new_empty(0)
    _run(
        backend,
        _contiguous_rows(logits),
        target,
        weight,
        token_weight,
        scale,
        (ignore_index, label_smoothing, z_loss, softcap, logit_scale),
        loss=loss,
        lse=lse if want_lse else None,
        grad=grad if want_grad else None,
    )
    return _total(loss, scale), lse, grad


@_reduced_op.register_fake
def _reduced_fake(logits, target, weight, token_weight, scale, *options):
    *_, want_lse, want_grad, _backend = options
    _, lse = _outputs(logits, want_lse)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if want_grad else logits.new_empty(0)
    return lse.new_empty(()), lse, grad


def _reduced_setup(ctx, inputs, output):
    _, lse, grad = output
    ctx.mark_non_differentiable(lse, grad)
    ctx.set_materialize_grads(False)  # else autograd makes an (N, V) array of zeros as the gradient of `grad`
    ctx.save_for_backward(grad)


def _reduced_backward(ctx, grad_loss, _grad_lse, _grad_grad):
    (grad,) = ctx.saved_tensors
    return _times(grad, grad_loss), *[None] * 12


_reduced_op.register_autograd(_reduced_backward, setup_context=_reduced_setup)


def _times(grad: Tensor, factor: Tensor, op: str = "cross_entropy") -> Tensor:
    """grad * factor (0-dim), rounded once.

    The saved `grad` itself is given away only when no second backward can come.
    """
    if torch.compiler.is_compiling() or type(factor) is not Tensor:  # the latter: inside AOTAutograd
        return (grad.to(factor.dtype) * factor).to(grad.dtype)
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op} is twice differentiable only with backend='reference' (and not in place)")
    keep = torch._C._autograd._get_current_graph_task_keep_graph()
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return grad.clone() if keep else grad
    out = torch.empty_like(grad) if keep else grad
    chosen = backends.select("scale", None, grad.device.type, (grad.dtype,))
    backends.implementation("scale", chosen)(grad, factor, out)
    return out


# ---- mean and sum, the logits' storage becomes the gradient ----------------------------------------------------------


@torch.library.custom_op("fastft::cross_entropy_", mutates_args={"logits"})
def _in_place_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    scale: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    want_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss (), lse (N,) or (0,)); `logits` is overwritten by the gradient."""
    loss, lse = _outputs(logits, want_lse)
    rows = _contiguous_rows(logits)
    _run(
        backend,
        rows,
        target,
        weight,
        token_weight,
        scale,
        (ignore_index, label_smoothing, z_loss, softcap, logit_scale),
        loss=loss,
        lse=lse if want_lse else None,
        grad=rows,
    )
    if rows is not logits:
        logits.copy_(rows)
    return _total(loss, scale), lse


@_in_place_op.register_fake
def _in_place_fake(logits, target, weight, token_weight, scale, *options):
    _, lse = _outputs(logits, options[-2])
    return lse.new_empty(()), lse


class _InPlace(torch.autograd.Function):
    """torch.library cannot give an op that mutates its input a gradient, so this one is an autograd.Function."""

    @staticmethod
    def forward(ctx, logits, target, weight, token_weight, scale, options, want_lse, backend):
        # Shares the version counter: whoever saved these logits for a backward gets torch's error.
        data = logits.detach()
        loss, lse = _in_place_op(data, target, weight, token_weight, scale, *options, want_lse, backend)
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(data)
        return loss, lse

    @staticmethod
    def backward(ctx, grad_loss, _grad_lse):
        (grad,) = ctx.saved_tensors
        return _times(grad, grad_loss), *[None] * 7


# ---- none: the gradient waits for the backward, which brings a factor per row ----------------------------------------


@torch.library.custom_op("fastft::cross_entropy_rows", mutates_args=())
def _rows_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    want_lse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """(loss (N,), lse (N,) or (0,))."""
    loss, lse = _outputs(logits, want_lse)
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = _contiguous_rows(logits)
    _run(
        backend, rows, target, weight, token_weight, None, options, loss=loss, lse=lse if want_lse else None, grad=None
    )
    return loss, lse


@_rows_op.register_fake
def _rows_fake(logits, target, weight, token_weight, *options):
    return _outputs(logits, options[-2])


@torch.library.custom_op("fastft::cross_entropy_rows_backward", mutates_args=())
def _rows_grad_op(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    grad_loss: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    backend: str,
) -> Tensor:
    """Gradient (N, V) of sum_i grad_loss_i * loss_i."""
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = _contiguous_rows(logits)
    _run(backend, rows, target, weight, token_weight, grad_loss.contiguous(), options, loss=None, lse=None, grad=grad)
    return grad


@_rows_grad_op.register_fake
def _rows_grad_fake(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _rows_setup(ctx, inputs, output):
    logits, target, weight, token_weight, *options, _want_lse, backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(logits, target, weight, token_weight)
    ctx.options = (*options, backend)


def _rows_backward(ctx, grad_loss, _grad_lse):
    logits, target, weight, token_weight = ctx.saved_tensors
    return _rows_grad_op(logits, target, weight, token_weight, grad_loss, *ctx.options), *[None] * 10


_rows_op.register_autograd(_rows_backward, setup_context=_rows_setup)


# ---- the reference's look at the targets -----------------------------------------------------------------------------


@torch.library.custom_op("fastft::bad_target_row", mutates_args=())
def _bad_row_op(target: Tensor, ignore_index: int, vocab: int) -> Tensor:
    """() int64: a row whose target is out of range, -1 when there is none. IndexError on the CPU when there is."""
    bad_row = cross_entropy_reference.bad_row(target, ignore_index, vocab)
    _report(bad_row, target, ignore_index, vocab)
    return bad_row.clone()  # what an op returns must not alias the flag


@_bad_row_op.register_fake
def _bad_row_fake(target, ignore_index, vocab):
    return target.new_empty(())


_CUDA = frozenset({"cuda"})  # on CPU tensors Triton runs only in its interpreter, which is for tests
_LOAD_REFERENCE = {
    "cross_entropy": lambda: cross_entropy_reference.cross_entropy,
    "scale": lambda: cross_entropy_reference.scale,
}
backends.register("cross_entropy", "native", load=native.loader("cross_entropy"), refuses=native.refuses)
for _op in ("cross_entropy", "scale"):
    backends.register(
        _op, "triton", load=triton.loader("cross_entropy", _op), refuses=triton.refuses, automatic_on=_CUDA
    )
    backends.register(_op, "reference", load=_LOAD_REFERENCE[_op], refuses=lambda *_: "")
