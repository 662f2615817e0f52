"""Sharded classes on real gloo ranks give the loss and gradient of the whole row."""

import pytest

import launch

PROGRAM = """
import os, sys, itertools, torch, torch.distributed as dist
from fastft.cli import leave
from fastft.ops import cross_entropy, vocab_parallel_cross_entropy

dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
collectives = 0
real = dist.all_gather
def counted(*args, **kwargs):
    global collectives
    collectives += 1
    return real(*args, **kwargs)
dist.all_gather = counted

def one(seed, dtype, reduction, options, weighted, even):
    g = torch.Generator().manual_seed(seed)
    rows, vocab = (3, 7), 40 * world if even else 101
    full = (3 * torch.randn(*rows, vocab, generator=g)).to(dtype)
    target = torch.randint(vocab, rows, generator=g)
    target[0, 1] = target[2, 2] = -100
    weight = torch.rand(rows, generator=g) + 0.5 if weighted else None
    bounds = [vocab * r // world for r in range(world + 1)]
    where = {} if even else {"vocab_start": bounds[rank], "vocab_size": vocab}
    mine = full[..., bounds[rank]:bounds[rank + 1]].clone().requires_grad_()
    truth = full.double().requires_grad_()
    single = full.clone().requires_grad_()
    upstream = torch.rand(rows, generator=g) if reduction == "none" else torch.tensor(1.7)
    losses = []
    for x, call, more in (
        (truth, cross_entropy, {"backend": "reference"}),
        (single, cross_entropy, {}),
        (mine, vocab_parallel_cross_entropy, where),
    ):
        w = weight.double() if weighted and x is truth else weight
        losses.append(call(x, target, reduction=reduction, token_weight=w, **options, **more))
        losses[-1].backward(upstream.to(losses[-1].dtype))
    assert losses[2].dtype == torch.float32 and losses[2].shape == losses[1].shape
    every = [torch.empty_like(losses[2]) for _ in range(world)]
    real(every, losses[2].detach())
    assert all(torch.equal(e, every[0]) for e in every), "losses differ between ranks"
    # Beside torch's own error: the ranks' logsumexps travel as float32, off by up to half a unit in the last place of
    # about 10.
    def close(got, peer, true, what):
        error, theirs = ((x.double() - true).abs().max().item() for x in (got, peer))
        allowed = 2 * theirs + 1e-6 * max(1.0, true.abs().max().item())
        assert error <= allowed, (what, error, allowed, dtype, reduction, options)
    close(losses[2].detach(), losses[1].detach(), losses[0].detach(), "loss")
    part = slice(bounds[rank], bounds[rank + 1])
    close(mine.grad, single.grad[..., part], truth.grad[..., part], "gradient")
    assert (mine.grad[target == -100] == 0).all()

OPTIONS = ({}, {"z_loss": 1e-2}, {"label_smoothing": 0.1}, {"softcap": 5.0, "logit_scale": 0.7},
           {"softcap": 5.0, "label_smoothing": 0.2, "z_loss": 1e-3})
DTYPES = (torch.float32, torch.bfloat16)
cases = list(itertools.product(DTYPES, ("mean", "sum", "none"), OPTIONS, (False, True), (True, False)))
for seed, case in enumerate(cases):
    one(seed, *case)
assert collectives == len(cases), "one collective per call"

logits, target = torch.zeros(2, 4), torch.tensor([0, 4 * world])
try:
    vocab_parallel_cross_entropy(logits, target)
    raise SystemExit("an out-of-range target went through")
except IndexError as e:
    assert f"target {4 * world} at position 1" in str(e)
try:
    vocab_parallel_cross_entropy(logits, target, vocab_start=0)
    raise SystemExit("half a description went through")
except ValueError as e:
    assert "both vocab_start and vocab_size" in str(e)
ignored = torch.full((2,), -100)
loss = vocab_parallel_cross_entropy(logits.requires_grad_(), ignored)
loss.backward()
assert loss == 0 and (logits.grad == 0).all()
bad = torch.zeros(4, 5)
bad[0] = -torch.inf
bad[1, 2], bad[2, 0] = torch.inf, torch.nan
for more in ({}, {"label_smoothing": 0.1}):
    bad.grad = None
    only = torch.tensor([-100, -100, -100, 3])
    vocab_parallel_cross_entropy(bad.requires_grad_(), only, **more).backward()
    reached = not bad.grad.isfinite().all() or (bad.grad[:3] != 0).any()
    assert not reached and (bad.grad[3] != 0).all(), "ignored rows' logits reach the gradient"
dist.destroy_process_group()
leave(0)
"""


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
def test_sharded_classes_equal_whole_rows(world):
    launch.ranks(world, ["-c", PROGRAM])
