"""Softmax cross-entropy in Triton: one program per row, an online softmax over blocks,
then the gradient block by block.

Two reads and one write of the logits; rows longer than the L2 share of a program are read from memory twice. Offsets
are 64-bit: rows * V passes 2^31 with 16k tokens and 131k classes.
"""

import torch
from torch import Tensor

from fastft.ops.triton import require

triton = require()
import triton.language as tl  # noqa: E402  (after require(), whose error names the extra)


@triton.jit
def _tanh(a):
    # Triton has no portable tanh. 1 - 2 / (exp(2a) + 1) cancels for small a; there the series is exact to float32.
    size = tl.abs(a)
    large = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    large = tl.where(a < 0, -large, large)
    s = a * a
    small = a * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835 + s * (-1382.0 / 155925))))))
    return tl.where(size < 0.25, small, large)


@triton.jit
def _read(row_ptr, columns, mask, logit_scale, softcap, CAPPED: tl.constexpr):
    """x = cap(logit_scale * logits) in float32; -inf outside the
    row (set last, or a cap or a negative scale would undo it).
    """
    x = tl.load(row_ptr + columns, mask=mask, other=0.0).to(tl.float32) * logit_scale
    if CAPPED:
        x = softcap * _tanh(x / softcap)
    return tl.where(mask, x, float("-inf"))


@triton.jit
def _cross_entropy_kernel(
    logits,
    logits_stride,
    target,
    class_weight,  # or None
    class_weight_sum,  # float32 scalar, or None
    token_weight,  # or None
    token_weight_stride,
    grad_scale,  # or None
    grad_scale_stride,
    loss,  # or None
    lse,  # or None
    grad,  # or None; may be logits
    grad_stride,
    bad_row,
    vocab,
    ignore_index,
    label_smoothing,
    smooth_per_class,  # label_smoothing / V, divided in float64
    z_loss,
    softcap,
    logit_scale,
    CAPPED: tl.constexpr,
    SMOOTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    y = tl.load(target + row)
    ignored = y == ignore_index
    bad = (ignored == 0) & ((y < 0) | (y >= vocab))
    counts = (ignored == 0) & (bad == 0)
    if bad:
        tl.atomic_max(bad_row, row)

    row_ptr = logits + row * logits_stride
    offsets = tl.arange(0, BLOCK)
    # Read before anything is written: with grad == logits another warp may be past this point long before this one.
    x_y = _read(row_ptr, y, counts, logit_scale, softcap, CAPPED)
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    weighted = tl.full((), 0.0, tl.float32)
    wanted = counts
    if lse is not None:
        wanted = True
    if wanted:
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            x = _read(row_ptr, columns, mask, logit_scale, softcap, CAPPED)
            new_top = tl.maximum(top, tl.max(x, axis=0))
            # While only -inf was seen, exp(-inf - -inf) would be nan.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            total = total * tl.exp(top - base) + tl.sum(tl.exp(x - base), axis=0)
            top = new_top
            if SMOOTH:
                if class_weight is not None:
                    x = x * tl.load(class_weight + columns, mask=mask, other=0.0)
                weighted += tl.sum(tl.where(mask, x, 0.0), axis=0)
    log_total = tl.log(total)
    row_lse = top + log_total
    if lse is not None:
        tl.store(lse + row, row_lse)

    w_y = 1.0
    if class_weight is not None:
        w_y = tl.load(class_weight + y, mask=counts, other=0.0)
    token = 1.0
    if token_weight is not None:
        token = tl.load(token_weight + row * token_weight_stride)
    if SMOOTH:
        weight_sum = vocab * 1.0
        if class_weight is not None:
            weight_sum = tl.load(class_weight_sum)
        w_y = w_y * (1.0 - label_smoothing)
    if loss is not None:
        # (top - x_y) + log_total, not lse - x_y: exact also where the loss is tiny beside lse.
        value = w_y * ((top - x_y) + log_total) + z_loss * row_lse * row_lse
        if SMOOTH:
            value += smooth_per_class * (weight_sum * row_lse - weighted)
        value = tl.where(counts, token * value, tl.where(ignored, 0.0, float("nan")))
        tl.store(loss + row, value)

    if grad is not None:
        factor = token * logit_scale
        if grad_scale is not None:
            factor = factor * tl.load(grad_scale + row * grad_scale_stride)
        of_p = w_y + 2.0 * z_loss * row_lse
        if SMOOTH:
            of_p += smooth_per_class * weight_sum
        grad_ptr = grad + row * grad_stride
        for start in range(0, vocab, BLOCK):
            columns = start + offsets
            mask = columns < vocab
            if counts:
                x = _read(row_ptr, columns, mask, logit_scale, softcap, CAPPED)
                # (x - top) - log_total, not x - lse: lse is rounded at the size of the logits.
                d = tl.exp((x - top) - log_total) * of_p
                if SMOOTH:
                    if class_weight is not None:
                        d -= smooth_per_class * tl.load(class_weight + columns, mask=mask, other=0.0)
                    else:
                        d -= smooth_per_class
                d = tl.where(columns == y, d - w_y, d)
                if CAPPED:
                    d *= 1.0 - (x / softcap) * (x / softcap)
                d *= factor
            else:
                d = tl.zeros([BLOCK], dtype=tl.float32)
            tl.store(grad_ptr + columns, d.to(grad.dtype.element_ty), mask=mask)


def cross_entropy(
    logits: Tensor,  # (N, V), rows contiguous
    target: Tensor,  # (N,) int64
    weight: Tensor | None,  # (V,) float32
    token_weight: Tensor | None,  # (N,) or () float32
    grad_scale: Tensor | None,  # (N,) or () float32
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
    """One launch, one program per row."""
    rows, vocab = logits.shape
    block = min(triton.next_power_of_2(vocab), 8192)
    with _on(logits.device):
        _cross_entropy_kernel[(rows,)](
            logits,
            logits.stride(0),
            target,
            weight,
            weight.sum(dtype=torch.float64).float() if weight is not None and label_smoothing else None,
            token_weight,
            _stride(token_weight),
            grad_scale,
            _stride(grad_scale),
            loss,
            lse,
            grad,
            0 if grad is None else grad.stride(0),
            bad_row,
            vocab,
            ignore_index,
            label_smoothing,
            label_smoothing / vocab,
            z_loss,
            softcap,
            logit_scale,
            CAPPED=softcap != 0.0,
            SMOOTH=label_smoothing != 0.0,
            BLOCK=block,
            num_warps=4 if block <= 2048 else 8 if block <= 4096 else 16,
        )


@triton.jit
def _scale_kernel(grad, factor, out, n, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    f = tl.load(factor)
    moves = True
    if IN_PLACE:
        moves = f != 1.0  # the usual case: the launch costs a few microseconds, not a pass over memory
    if moves:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(grad + i, mask=i < n, other=0.0).to(tl.float32)
        tl.store(out + i, (x * f).to(out.dtype.element_ty), mask=i < n)


def scale(grad: Tensor, factor: Tensor, out: Tensor) -> None:
    """out = grad * factor (0-dim float32), product in float32; contiguous; `out` may be `grad`. Waits for nothing."""
    n = grad.numel()
    if n:
        with _on(grad.device):
            _scale_kernel[(triton.cdiv(n, 4096),)](grad, factor, out, n, IN_PLACE=out is grad, BLOCK=4096)


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.ndim == 0 else tensor.stride(0)


def _on(device: torch.device):
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device if device.type == "cuda" else -1)  # -1: do nothing
