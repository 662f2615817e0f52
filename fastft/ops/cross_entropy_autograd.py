"""cross_entropy as torch sees it: custom ops on flat rows, their fakes for compilers, and their gradients.

Three forms: for "mean" and "sum" the forward computes the gradient, into an array of its own or in place of the logits;
for "none" the backward does, since only it knows each row's factor.
"""

import torch
from torch import Tensor

from fastft.ops.cross_entropy_common import contiguous_rows, new_outputs, run_kernel, scaled_gradient, sum_rows

# ---- mean and sum: the forward computes the gradient -----------------------------------------------------------------


@torch.library.custom_op("fastft::cross_entropy", mutates_args=())
def reduced_op(
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
    loss, lse = new_outputs(logits, want_lse)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if want_grad else logits.new_empty(0)
    run_kernel(
        backend,
        contiguous_rows(logits),
        target,
        weight,
        token_weight,
        scale,
        (ignore_index, label_smoothing, z_loss, softcap, logit_scale),
        loss=loss,
        lse=lse if want_lse else None,
        grad=grad if want_grad else None,
    )
    return sum_rows(loss, scale), lse, grad


@reduced_op.register_fake
def _reduced_fake(logits, target, weight, token_weight, scale, *options):
    *_, want_lse, want_grad, _backend = options
    _, lse = new_outputs(logits, want_lse)
    grad = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if want_grad else logits.new_empty(0)
    return lse.new_empty(()), lse, grad


def _reduced_setup(ctx, inputs, output):
    _, lse, grad = output
    ctx.mark_non_differentiable(lse, grad)
    ctx.set_materialize_grads(False)  # else autograd makes an (N, V) array of zeros as the gradient of `grad`
    ctx.save_for_backward(grad)


def _reduced_backward(ctx, grad_loss, _grad_lse, _grad_grad):
    (grad,) = ctx.saved_tensors
    return scaled_gradient(grad, grad_loss), *[None] * 12


reduced_op.register_autograd(_reduced_backward, setup_context=_reduced_setup)


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
    loss, lse = new_outputs(logits, want_lse)
    rows = contiguous_rows(logits)
    run_kernel(
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
    return sum_rows(loss, scale), lse


@_in_place_op.register_fake
def _in_place_fake(logits, target, weight, token_weight, scale, *options):
    _, lse = new_outputs(logits, options[-2])
    return lse.new_empty(()), lse


class InPlace(torch.autograd.Function):
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
        return scaled_gradient(grad, grad_loss), *[None] * 7


# ---- none: the gradient waits for the backward, which brings a factor per row ----------------------------------------


@torch.library.custom_op("fastft::cross_entropy_rows", mutates_args=())
def rows_op(
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
    loss, lse = new_outputs(logits, want_lse)
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    rows = contiguous_rows(logits)
    run_kernel(
        backend, rows, target, weight, token_weight, None, options, loss=loss, lse=lse if want_lse else None, grad=None
    )
    return loss, lse


@rows_op.register_fake
def _rows_fake(logits, target, weight, token_weight, *options):
    return new_outputs(logits, options[-2])


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
    rows = contiguous_rows(logits)
    run_kernel(
        backend, rows, target, weight, token_weight, grad_loss.contiguous(), options, loss=None, lse=None, grad=grad
    )
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


rows_op.register_autograd(_rows_backward, setup_context=_rows_setup)
