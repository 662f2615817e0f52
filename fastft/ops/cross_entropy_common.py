"""What cross_entropy, linear_cross_entropy and vocab_parallel_cross_entropy share: a kernel's call on prepared tensors,
the look at its out-of-range flag, denominators, totals, and the product that a backward needs.
"""

from typing import TypedDict

import torch
from torch import Tensor

from fastft.ops import backends, cross_entropy_reference

NOTHING = torch.iinfo(torch.int64).min  # what ignore_index=None stands for: no class index
CUDA = frozenset({"cuda"})  # on CPU tensors Triton runs only in its interpreter, which is for tests

_flags: dict[torch.device, Tensor] = {}  # CUDA device -> () int64, the last row whose target was out of range, or -1


class LossOptions(TypedDict, total=False):
    """Keyword arguments of every cross-entropy here, for the overloads that type checkers read."""

    ignore_index: int | None
    label_smoothing: float
    reduction: str
    z_loss: float
    softcap: float | None
    logit_scale: float
    token_weight: Tensor | None
    backend: str | None


def compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def inverse_denominator(target, weight, token_weight, ignore_index, vocab, dtype) -> Tensor:
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


def contiguous_rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()


def new_outputs(logits: Tensor, want_lse: bool) -> tuple[Tensor, Tensor]:
    """Empty (loss (N,), lse (N,) or (0,))."""
    dtype, rows = compute_dtype(logits), logits.shape[0]
    return logits.new_empty(rows, dtype=dtype), logits.new_empty(rows if want_lse else 0, dtype=dtype)


def sum_rows(row_loss: Tensor, scale: Tensor | None) -> Tensor:
    """The sum of (N,) losses, times scale, 0-dim."""
    # float64 because 32k terms in float32 would lose what the kernel kept; it is N numbers, not N * V.
    total = row_loss.sum(dtype=torch.float64)
    return (total if scale is None else total * scale).to(row_loss.dtype)


def run_kernel(backend, logits, target, weight, token_weight, grad_scale, options, *, loss, lse, grad) -> None:
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
    report_bad_row(bad_row, target, ignore_index, logits.shape[1])


def report_bad_row(bad_row: Tensor, target: Tensor, ignore_index: int, vocab: int) -> None:
    """IndexError on the CPU when a row is bad; on CUDA it is remembered for `bad_target`, without waiting."""
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


def bad_target(device: torch.device | str) -> int:
    """Row of the last out-of-range target that was met on this CUDA device, -1 when there was none.

    Waits for the device. Ask for it when a loss is nan; the answer is cleared.
    """
    device = torch.empty(0, device=device).device  # "cuda" -> cuda:0
    flag = _flags.pop(device, None)
    return -1 if flag is None else int(flag.item())


@torch.library.custom_op("fastft::bad_target_row", mutates_args=())
def bad_row_op(target: Tensor, ignore_index: int, vocab: int) -> Tensor:
    """() int64: a row whose target is out of range, -1 when there is none. IndexError on the CPU when there is."""
    bad_row = cross_entropy_reference.bad_row(target, ignore_index, vocab)
    report_bad_row(bad_row, target, ignore_index, vocab)
    return bad_row.clone()  # what an op returns must not alias the flag


@bad_row_op.register_fake
def _bad_row_fake(target, ignore_index, vocab):
    return target.new_empty(())


def scaled_gradient(grad: Tensor, factor: Tensor, op: str = "cross_entropy") -> Tensor:
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
