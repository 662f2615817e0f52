"""Every op in a captured CUDA graph and on a stream of its own: the stream that is current is the one it uses, it waits
for nothing, and a replay computes from the inputs' present values.
"""

from unittest import mock

import pytest
import torch

from fastft.ops import cross_entropy, linear_cross_entropy, sum_squares
from fastft.ops import linear_cross_entropy_chunks as chunks
from fastft.ops.adamw import adamw
from fastft.ops.decoder import gated, rms_norm
from fastft.ops.linear_cross_entropy_plan import Plan
from tests.ops.common import BACKENDS, DEVICE, seeded

BF16, F32 = torch.bfloat16, torch.float32
ROWS = 24


def draw(seed: int, *shapes: tuple, dtype=F32) -> list[torch.Tensor]:
    g = seeded(seed)
    return [torch.randn(shape, generator=g).to(dtype).to(DEVICE) for shape in shapes]


def target_of(vocab: int) -> torch.Tensor:
    target = torch.randint(vocab, (ROWS,), generator=seeded(vocab))
    target[::5] = -100
    return target.to(DEVICE)


def of_logits(vocab, dtype, **options):
    """(draw inputs from a seed, compute results from inputs and a backend)"""
    target = target_of(vocab)

    def run(inputs, backend):
        leaf = inputs[0].detach().requires_grad_()
        logits = leaf * 1 if "inplace" in options else leaf
        loss = 2.0 * cross_entropy(logits, target, backend=backend, **options)
        return [loss.detach(), *torch.autograd.grad(loss.sum(), leaf)]

    return lambda seed: draw(seed, (ROWS, vocab), dtype=dtype), run


def of_a_head(vocab, plan=None, **options):
    target = target_of(vocab)

    def run(inputs, backend):
        leaves = [t.detach().requires_grad_() for t in inputs]
        with mock.patch.object(chunks, "_plan", (lambda *_: plan) if plan else chunks._plan):
            loss = 2.0 * linear_cross_entropy(*leaves, target, backend=backend, **options)
            return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]

    return lambda seed: draw(seed, (ROWS, 64), (vocab, 64), dtype=BF16), run


def of_adamw(tensors: int):
    shapes = [(5 + i, 3) for i in range(tensors)]

    def run(inputs, backend):
        p, g, m, v = ([t.clone() for t in inputs[i * tensors : (i + 1) * tensors]] for i in range(4))
        v = [t.square() for t in v]
        steps = [torch.ones((), device=DEVICE) for _ in shapes]
        options = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
        adamw(p, g, m, v, [], steps, **options, backend=backend)
        return [*p, *m, *v, *steps]

    return lambda seed: draw(seed, *shapes * 4), run


def of_a_layer_part(function, *shapes):
    """Of fastft.ops.decoder, which has one implementation a device."""

    def run(inputs, backend):
        leaves = [t.detach().requires_grad_() for t in inputs]
        out = function(*leaves)
        return [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))]

    return lambda seed: draw(seed, *shapes, dtype=BF16), run


CASES = {
    "cross_entropy": of_logits(507, F32),
    "cross_entropy, long rows": of_logits(33_000, BF16),
    "cross_entropy, in place": of_logits(5003, BF16, inplace=True),
    "cross_entropy, none": of_logits(5003, BF16, reduction="none"),
    "linear_cross_entropy": of_a_head(512),
    "linear_cross_entropy, odd": of_a_head(507),
    "linear_cross_entropy, chunks": of_a_head(507, chunk_bytes=7 * 512 * 2),
    "linear_cross_entropy, parked": of_a_head(507, Plan(12, parked=12)),
    "linear_cross_entropy, none": of_a_head(507, reduction="none"),
    "sum_squares": (
        lambda seed: draw(seed, (70_001,), (33, 17)),
        lambda inputs, backend: [sum_squares(inputs, backend=backend)],
    ),
    "rms_norm": of_a_layer_part(lambda x, w: rms_norm(x, w, 1e-6), (70, 640), (640,)),
    "gated": of_a_layer_part(gated, (70, 1100), (70, 1100)),
    "adamw": of_adamw(3),
    "adamw, a table in pieces": of_adamw(80),
}
each_case = pytest.mark.parametrize("case", CASES)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def assert_same(got, expected):
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"result {i}: {(a.double() - b.double()).abs().max().item():.3g} apart"


@pytest.mark.skipif(DEVICE == "cuda", reason="the tests below do more")
@pytest.mark.parametrize("case", [name for name in CASES if "long" not in name])
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b == "reference" or b.values[0] == "native"])
def test_cases_are_functions_of_their_inputs(case, backend):
    inputs, run = CASES[case]
    assert_same(run(inputs(1), backend), run(inputs(1), backend))
    assert any(not torch.equal(a, b) for a, b in zip(run(inputs(1), backend), run(inputs(2), backend), strict=True))


@pytest.mark.gpu
@each_case
@each_backend
def test_captured_in_a_graph(case, backend):
    inputs, run = CASES[case]
    held, fresh = inputs(1), inputs(2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(held, backend)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(held, backend)
    for number in (2, 3):  # the second replay finds what the first left
        fresh = inputs(number)
        for h, f in zip(held, fresh, strict=True):
            h.copy_(f)
        run(inputs(4), backend)  # an eager call between replays must not change what they read
        graph.replay()
        torch.cuda.synchronize()
        assert_same(captured, run(fresh, backend))


@pytest.mark.gpu
@each_case
@each_backend
def test_on_a_stream_of_its_own(case, backend):
    inputs, run = CASES[case]
    fresh = inputs(2)
    expected = run(fresh, backend)
    held = [torch.zeros_like(t) for t in fresh]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # some 10 ms: a kernel on another stream would read the zeros
        for h, f in zip(held, fresh, strict=True):
            h.copy_(f)
        got = run(held, backend)
    stream.synchronize()
    assert_same(got, expected)
