"""Softmax cross-entropy where every rank of a process group holds the logits of its own share of the classes.

A rank reads its shard once for its logsumexp and once for the gradient; between the two is one collective of a few
numbers per row (Megatron-LM, arXiv 1909.08053, section 3, needs three all-reduces).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from fastft.ops import backends, cross_entropy_check
from fastft.ops.cross_entropy_common import (
    NOTHING,
    bad_row_op,
    contiguous_rows,
    inverse_denominator,
    run_kernel,
    scaled_gradient,
    sum_rows,
)
from fastft.ops.transforms import refuse_transforms

_IGNORED = -100  # within a shard: no class there is negative


def vocab_parallel_cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    vocab_start: int | None = None,
    vocab_size: int | None = None,
    ignore_index: int | None = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """`fastft.ops.cross_entropy` over classes sharded across `group`; every rank of it has to call.

    logits       (..., V_local), float32 or bfloat16: this rank's classes, [vocab_start, vocab_start + V_local).
    target       (...), int64: classes of the whole vocabulary, the same on all ranks.
    vocab_start  class of logits[..., 0]; default: equal shares in the order of the ranks.
    vocab_size   classes over all ranks; default: V_local times the ranks.
    The other arguments are cross_entropy's, and have to be the same on all ranks.

    Returns the loss in float32, the same bits on every rank: 0-dim, or target's shape for reduction="none". Its
    gradient with respect to the local logits is computed in the forward (for "none" in the backward, which brings a
    factor per row) and rounded once.

    Raises what cross_entropy raises; ValueError when only one of vocab_start and vocab_size is given.
    """
    refuse_transforms("vocab_parallel_cross_entropy", logits, target)
    ignore_index = NOTHING if ignore_index is None else ignore_index
    cross_entropy_check.check(logits, target, None, token_weight, label_smoothing, reduction, softcap, False)
    if (vocab_start is None) != (vocab_size is None):
        raise ValueError("give both vocab_start and vocab_size, or neither for equal shares")
    shard, rows = logits.shape[-1], logits.reshape(-1, logits.shape[-1])
    if vocab_start is None:
        vocab_start, vocab_size = dist.get_rank(group) * shard, dist.get_world_size(group) * shard
    flat_target = target.reshape(-1).contiguous()
    bad_row_op(flat_target, ignore_index, vocab_size)
    if token_weight is not None:
        token_weight = token_weight.to(torch.float32).reshape(-1 if token_weight.ndim else ())
    factor = token_weight
    if reduction == "mean":
        inverse = inverse_denominator(flat_target, None, token_weight, ignore_index, vocab_size, torch.float32)
        factor = inverse if factor is None else factor * inverse
    chosen = backends.select("cross_entropy", backend, logits.device.type, (logits.dtype,))
    options = (ignore_index, label_smoothing, z_loss, softcap or 0.0, logit_scale)
    loss = _VocabParallel.apply(
        rows, flat_target, factor, group, vocab_start, vocab_size, options, chosen, reduction != "none"
    )
    return loss.reshape(target.shape) if reduction == "none" else sum_rows(loss, None)


class _VocabParallel(torch.autograd.Function):
    """Per-row losses, already times factor."""

    @staticmethod
    def forward(ctx, rows, target, factor, group, start, vocab, options, backend, gradient_now):
        ignore_index, smoothing, z_loss, softcap, logit_scale = options
        rows = contiguous_rows(rows)
        valid = target != ignore_index
        local = target - start
        owned = valid & (local >= 0) & (local < rows.shape[1])
        at = torch.where(owned, local, 0)
        lse_local = torch.empty(len(target), dtype=torch.float32, device=rows.device)
        nothing = torch.full_like(target, ignore_index)  # every row ignored: the kernel gives the logsumexp alone
        run_kernel(
            backend,
            rows,
            nothing,
            None,
            None,
            None,
            (ignore_index, 0.0, 0.0, softcap, logit_scale),
            loss=None,
            lse=lse_local,
            grad=None,
        )
        x_at = _cap(rows.gather(1, at[:, None])[:, 0].float() * logit_scale, softcap)  # (N,)
        total = _cap(rows.float() * logit_scale, softcap).sum(1) if smoothing else torch.zeros_like(lse_local)

        packed = torch.stack([lse_local, torch.where(owned, x_at, 0.0), total])  # (3, N): the one collective
        gathered = [torch.empty_like(packed) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, packed, group=group)
        every = torch.stack(gathered)  # (ranks, 3, N), in the same order everywhere: the same bits everywhere
        lse, x_y, x_sum = torch.logsumexp(every[:, 0], 0), every[:, 1].sum(0), every[:, 2].sum(0)

        factor = torch.ones((), device=rows.device) if factor is None else factor
        loss = (1 - smoothing) * (lse - x_y) + z_loss * lse.square()
        if smoothing:
            loss = loss + smoothing * (lse - x_sum / vocab)
        if ctx.needs_input_grad[0]:
            ctx.now, ctx.rest = gradient_now, (vocab, options, backend)
            parts = (rows, torch.where(valid, at, _IGNORED), owned, lse_local, lse, factor.expand_as(lse), x_at)
            ctx.save_for_backward(*([_gradient(*parts, *ctx.rest)] if gradient_now else parts))
        return torch.where(valid, factor * loss, 0.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss):
        if ctx.now:  # grad_loss is one number, expanded by the sum over rows
            (grad,) = ctx.saved_tensors
            return scaled_gradient(grad, grad_loss[0] if len(grad_loss) else grad_loss.new_ones(())), *[None] * 8
        rows, at, owned, lse_local, lse, factor, x_at = ctx.saved_tensors
        return _gradient(rows, at, owned, lse_local, lse, factor * grad_loss, x_at, *ctx.rest), *[None] * 8


def _gradient(rows, at, owned, lse_local, lse, factor, x_at, vocab, options, backend) -> Tensor:
    """The logits' gradient, times the cap's slope:

    factor * ((1 + 2 z_loss lse) p_c - (1 - smoothing) [c is the target] - smoothing / vocab)
    """
    _, smoothing, z_loss, softcap, logit_scale = options
    valid, at = at != _IGNORED, at.clamp_min(0)
    of_p = factor * (1 + 2 * z_loss * lse)  # (N,)
    share = torch.exp(lse_local - lse)  # of all probability that this rank holds
    target_term = torch.where(owned, (1 - smoothing) * factor, 0.0)
    if smoothing:  # two terms of different scale, which no kernel has: float32, then one rounding
        x = _cap(rows.float() * logit_scale, softcap)
        grad = of_p[:, None] * torch.exp(x - lse[:, None]) - (smoothing / vocab * factor).expand_as(of_p)[:, None]
        grad.scatter_add_(1, at[:, None], -target_term[:, None])
        return torch.where(valid[:, None], grad * _slope(x, softcap) * logit_scale, 0.0).to(rows.dtype)
    grad = torch.empty_like(rows)
    target = torch.where(valid, at, _IGNORED)  # the kernel writes zeros there, whatever the logits are
    run_kernel(
        backend,
        rows,
        target,
        None,
        None,
        (share * of_p).contiguous(),
        (_IGNORED, 0.0, 0.0, softcap, logit_scale),
        loss=None,
        lse=None,
        grad=grad,
    )
    # The kernel took a whole target off at `at`, also on the ranks that do not hold it: that element again, in float32.
    exact = (of_p * torch.exp(x_at - lse) - target_term) * _slope(x_at, softcap) * logit_scale
    return grad.scatter_(1, at[:, None], torch.where(valid, exact, 0.0).to(grad.dtype)[:, None])


def _cap(x: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def _slope(x: Tensor, softcap: float) -> Tensor | float:
    """d capped / d uncapped, from the capped x."""
    return 1 - (x / softcap).square() if softcap else 1.0
