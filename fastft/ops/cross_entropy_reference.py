"""Softmax cross-entropy in plain PyTorch: what the kernels are tested against.

Float32 arithmetic, float64 for float64 logits.

Shapes: logits (N, V), target (N,) int64, weight (V,) or None, token_weight (N,), () or None. softcap 0.0 means none.
"""

import torch
from torch import Tensor


def scaled_and_capped(logits: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """x = cap(logit_scale * logits), (N, V)."""
    x = logits.to(_compute_dtype(logits)) * logit_scale
    return softcap * torch.tanh(x / softcap) if softcap else x


def logsumexp(logits: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """log sum_c exp(x_c), (N,)."""
    return torch.logsumexp(scaled_and_capped(logits, softcap, logit_scale), dim=-1)


def loss_per_row(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """Loss of each row, (N,), differentiable by autograd any number of times. Ignored rows: 0.

    An out-of-range target is read as a class that exists; whoever calls has to look for it.
    """
    valid = target != ignore_index
    # Ignored rows are blanked before anything is computed: a nan or inf there would come back as 0 * nan.
    x = scaled_and_capped(logits.masked_fill(~valid[:, None], 0.0), softcap, logit_scale)
    y = torch.where(valid, target, 0).clamp(0, logits.shape[1] - 1)
    lse = torch.logsumexp(x, dim=-1)
    loss = lse - x.gather(1, y[:, None])[:, 0]
    if weight is not None:
        loss = loss * weight[y]
    if label_smoothing:
        to_all = lse[:, None] - x
        if weight is not None:
            to_all = to_all * weight
        loss = (1 - label_smoothing) * loss + label_smoothing * to_all.mean(dim=-1)
    if z_loss:
        loss = loss + z_loss * lse.square()
    if token_weight is not None:
        loss = loss * token_weight
    return torch.where(valid, loss, 0.0)


def gradient(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
) -> Tensor:
    """d loss_per_row / d logits, (N, V), in closed form: what the kernels compute."""
    valid = target != ignore_index
    x = scaled_and_capped(logits.masked_fill(~valid[:, None], 0.0), softcap, logit_scale)
    y = torch.where(valid, target, 0).clamp(0, logits.shape[1] - 1)
    lse = torch.logsumexp(x, dim=-1)
    p = torch.exp(x - lse[:, None])
    weight = torch.ones_like(x[0]) if weight is None else weight
    w_y = ((1 - label_smoothing) * weight[y])[:, None]
    smooth = label_smoothing / logits.shape[1]
    grad = p * (w_y + smooth * weight.sum() + 2 * z_loss * lse[:, None]) - smooth * weight
    grad = grad.scatter_add(1, y[:, None], -w_y)
    if softcap:
        grad = grad * (1 - (x / softcap).square())
    grad = grad * logit_scale
    if token_weight is not None:
        grad = grad * (token_weight[:, None] if token_weight.ndim else token_weight)
    return torch.where(valid[:, None], grad, 0.0)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    grad_scale: Tensor | None,
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    loss: Tensor | None,
    lse: Tensor | None,
    grad: Tensor | None,
    bad_row: Tensor,
) -> None:
    """The interface of a kernel: writes into loss, lse, grad (may be `logits`) and bad_row."""
    options = (ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    bad = is_bad(target, ignore_index, logits.shape[1])
    bad_row.copy_(_first(bad))
    if loss is not None:
        loss.copy_(loss_per_row(logits, target, weight, token_weight, *options).masked_fill(bad, torch.nan))
    if lse is not None:
        lse.copy_(logsumexp(logits, softcap, logit_scale))
    if grad is not None:
        result = gradient(logits, target, weight, token_weight, *options)
        if grad_scale is not None:
            result = result * (grad_scale[:, None] if grad_scale.ndim else grad_scale)
        grad.copy_(result.masked_fill(bad[:, None], 0.0))


def scale(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = grad * factor (0-dim), the product taken in float32 or better. `out` may be `grad`."""
    if grad.device.type == "cpu":
        torch.mul(grad, factor, out=out)  # the CPU multiplies bfloat16 by a float32 scalar in float32
        return
    for part, result in zip(grad.split(1024), out.split(1024), strict=True):  # a float32 copy of 1024 rows at a time
        result.copy_(part.to(factor.dtype) * factor)


def is_bad(target: Tensor, ignore_index: int, vocab: int) -> Tensor:
    """(N,) bool: the target is no class and not ignore_index."""
    return (target != ignore_index) & ((target < 0) | (target >= vocab))


def bad_row(target: Tensor, ignore_index: int, vocab: int) -> Tensor:
    """() int64: the first row with a bad target, -1 when there is none."""
    return _first(is_bad(target, ignore_index, vocab))


def _first(bad: Tensor) -> Tensor:
    if bad.numel() == 0:
        return torch.full((), -1, dtype=torch.int64, device=bad.device)
    return torch.where(bad.any(), bad.to(torch.int8).argmax(), -1)


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
