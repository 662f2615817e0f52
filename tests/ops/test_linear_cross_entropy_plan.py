"""How linear_cross_entropy lays out and divides its work on a GPU: padding, parked gradients, the model.

All of it is torch's own operators, so that it can be forced upon the CPU.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.ops import linear_cross_entropy
from fastft.ops import linear_cross_entropy_chunks as chunks
from fastft.ops import linear_cross_entropy_plan as plans
from fastft.ops import linear_cross_entropy_sums as sums
from fastft.ops.linear_cross_entropy_plan import Plan
from tests.ops.common import DEVICE, NATIVE, seeded
from tests.ops.test_linear_cross_entropy import (
    DTYPES,
    assert_matches,
    formula,
    in_dtype,
    loss_and_gradients,
    make,
)


def _parked(rows: int) -> Plan:
    """Two chunks wait, one does not."""
    last = -(-2 * rows // 5)
    return Plan(max(last, 1), parked=rows - last)


PLANS = {"one chunk": lambda rows: Plan(max(rows, 1)), "chunks": lambda rows: Plan(9), "parked": _parked}
only_native = pytest.mark.parametrize("backend", [NATIVE])


@pytest.fixture(params=PLANS)
def as_on_a_gpu(request, monkeypatch):
    """Aligned pieces, and one way of dividing the rows; dW in blocks of 128 classes where gradients are parked."""
    monkeypatch.setattr(chunks, "ALIGNED_ON", frozenset({"cpu", "cuda"}))
    monkeypatch.setattr(chunks, "_plan", lambda count, *_: PLANS[request.param](count))
    monkeypatch.setattr(sums, "block_of_classes", lambda *_: 128)
    return request.param


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", ["plain", "bias", "low_rank", "all"])
@pytest.mark.parametrize("dtype", DTYPES)
@only_native
def test_matches_float64(as_on_a_gpu, backend, dtype, name, reduction):
    shape = (31, 37, 507)
    tensors, target, options = make(shape, name, dtype)
    upstream = torch.rand(shape[0], generator=seeded(*shape)).to(DEVICE)
    assert_matches(tensors, target, upstream, {**options, "reduction": reduction}, backend=backend)


@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 127, 128, 504, 512, 513])
@pytest.mark.parametrize("dtype", DTYPES)
@only_native
def test_any_number_of_classes(as_on_a_gpu, backend, dtype, vocab):
    tensors, target, options = make((30, 37, vocab), "bias", dtype)
    assert_matches(tensors, target, torch.ones(30, device=DEVICE), options, backend=backend)


@only_native
def test_gradients_have_the_weights_shape_and_are_whole(as_on_a_gpu, backend):
    tensors, target, _ = make((31, 37, 507), "low_rank", torch.bfloat16)
    _, grads = loss_and_gradients(linear_cross_entropy, tensors, target, backend=backend)
    assert all(grads[name].shape == t.shape and grads[name].is_contiguous() for name, t in tensors.items())


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@only_native
def test_ignored_rows_count_for_nothing_whatever_they_hold(as_on_a_gpu, backend, poison):
    """Their logits of padding are 0 * inf = nan, which must reach no gradient. float32: the CPU's own bfloat16 GEMM
    spreads an inf into the row before it where the inner dimension is odd.
    """
    tensors, target, _ = make((31, 37, 507), "low_rank", torch.float32)

    def of(tensors):  # with the logsumexp, ignored rows stay in the computation, as they do on CUDA
        return loss_and_gradients(
            lambda *a, **o: linear_cross_entropy(*a, return_lse=True, backend=backend, **o)[0], tensors, target
        )

    clean = of(tensors)
    ignored = torch.nonzero(target == -100)[:, 0]
    tensors["hidden"][ignored[0]], tensors["hidden2"][ignored[1], 0] = poison, poison
    poisoned = of(tensors)
    assert torch.equal(poisoned[0], clean[0])
    assert all(torch.equal(poisoned[1][name], clean[1][name]) for name in clean[1])


@only_native
def test_frozen_parts(as_on_a_gpu, backend):
    tensors, target, _ = make((31, 37, 507), "bias", torch.bfloat16)
    _, all_of_them = loss_and_gradients(linear_cross_entropy, tensors, target, backend=backend)
    for wanted in ({"hidden"}, {"weight"}, {"bias"}, {"weight", "bias"}, set()):
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
        loss = linear_cross_entropy(leaves["hidden"], leaves["weight"], target, bias=leaves["bias"], backend=backend)
        if wanted:
            loss.backward()
        for name, leaf in leaves.items():
            assert (leaf.grad is not None) == (name in wanted)
            assert leaf.grad is None or torch.equal(leaf.grad, all_of_them[name])


@only_native
def test_no_rows_and_all_rows_ignored(as_on_a_gpu, backend):
    weight = torch.randn(507, 37, device=DEVICE, requires_grad=True)
    for rows in (0, 3):
        hidden = torch.randn(rows, 37, device=DEVICE, requires_grad=True)
        target = torch.full((rows,), -100, device=DEVICE)
        loss = linear_cross_entropy(hidden, weight, target, backend=backend)
        grads = torch.autograd.grad(loss, (hidden, weight))
        assert loss == 0 and all((grad == 0).all() for grad in grads) and grads[1].shape == (507, 37)


@only_native
def test_parked_gradients_are_as_good_as_one_gemm(backend, monkeypatch):
    """Summed in float32 over both parts and rounded once."""
    g = seeded(5)
    tensors = {
        "hidden": (1 + 0.1 * torch.randn(512, 256, generator=g)).bfloat16().to(DEVICE),
        "weight": torch.randn(300, 256, generator=g).bfloat16().to(DEVICE),
    }
    target = torch.zeros(512, dtype=torch.int64, device=DEVICE)
    _, truth = loss_and_gradients(formula, in_dtype(tensors, torch.float64), target)
    errors = {}
    for name, plan in {"one": Plan(512), "parked": Plan(256, parked=256)}.items():
        monkeypatch.setattr(chunks, "_plan", lambda *_, plan=plan: plan)
        _, grads = loss_and_gradients(linear_cross_entropy, tensors, target, backend=backend)
        errors[name] = (grads["weight"].double() - truth["weight"]).abs().max() / truth["weight"].abs().max()
    assert errors["parked"] <= 1.01 * errors["one"] + 1e-6


SIZES = {"rows": st.integers(0, 70_000), "vocab": st.integers(1, 300_000), "hidden": st.integers(1, 9000)}


@settings(max_examples=300, deadline=None)
@given(itemsize=st.sampled_from([2, 4]), needs=st.tuples(st.booleans(), st.booleans()), **SIZES)
def test_the_models_plan_is_whole_and_fits(rows, vocab, hidden, itemsize, needs):
    plan = plans.by_model(rows, vocab, hidden, itemsize, *needs, 132)
    parts = plan.chunks(rows)
    assert [p.start for p in parts] == [0, *(p.stop for p in parts[:-1])][: len(parts)]
    assert sum(p.stop - p.start for p in parts) == rows and all(0 < p.stop - p.start <= plan.size for p in parts)
    assert plan.parked <= hidden and (not plan.parked or (needs[1] and itemsize == 2))
    more = 2 * vocab * hidden if needs[1] and itemsize == 2 and len(parts) > 1 and not plan.parked else 0
    assert plan.size * vocab * itemsize + more <= plans.CUDA_BYTES or plan.size <= plans.LEAST_ROWS
    assert plan.parked == 0 or parts[-1].start == plan.parked


@pytest.mark.parametrize(
    ("shape", "gib"),
    [
        ((8192, 4096, 128256), 1.0),  # half of the rows parked
        ((8192, 2304, 256000), 2.5),
        ((8192, 896, 151936), 2.4),
        ((8192, 2048, 32000), 0.5),  # these two at once
        ((8192, 768, 50304), 0.8),
    ],
)
def test_memory_of_common_heads(shape, gib):
    rows, hidden, vocab = shape
    plan = plans.by_model(rows, vocab, hidden, 2, True, True, 132)
    more = 2 * vocab * hidden if plan.size < rows and not plan.parked else 0
    assert (plan.size * vocab * 2 + more) / 2**30 <= gib


@pytest.mark.gpu
@pytest.mark.parametrize("vocab", [50257, 32000])
@only_native
def test_peak_memory_is_what_the_plan_says(backend, vocab):
    """Beyond inputs and gradients, with 10 % for the hidden states' copies and blocks of dW."""
    rows, hidden = 4096, 1024
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(vocab, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(vocab, (rows,), device="cuda")
    plan = plans.by_model(rows, -(-vocab // 64) * 64, hidden, 2, True, True, sums.multiprocessors(x.device))
    more = 2 * vocab * hidden if plan.size < rows and not plan.parked else 0
    linear_cross_entropy(x, weight, target, backend=backend).backward()
    x.grad = weight.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    linear_cross_entropy(x, weight, target, backend=backend).backward()
    gradients = 2 * hidden * (rows + vocab)
    used = torch.cuda.max_memory_allocated() - before - gradients
    assert used <= 1.1 * (2 * plan.size * vocab + more) + (64 << 20)
