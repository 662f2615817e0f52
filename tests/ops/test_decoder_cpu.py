"""The decoder layer's kernels for CPUs (fastft._C) against float64 and against torch, and bf16 computed in float32."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastft.ops import cpu as processor
from fastft.ops import decoder, linear_cross_entropy
from fastft.ops.decoder import attention, reference
from tests.ops.common import NATIVE_BUILT, assert_as_good_as, seeded
from tests.ops.test_decoder import DIM, GROUPS, HEADS, LENGTHS, Shape, decoder_layer, documents, family, weights_of

pytestmark = pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
DTYPES = [torch.float32, torch.bfloat16]


def kernels():
    from fastft.ops.decoder import cpu

    return cpu


def rand(*size: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=seeded(seed, *size)).to(dtype)


def gradients(run, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    given = [t.detach().requires_grad_() for t in inputs]
    out = run(*given)
    return [out.detach(), *torch.autograd.grad(out, given, grad.to(out.dtype))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_and_gates_against_float64(dtype):
    ops = kernels()
    for n, d in ((1, 1), (7, 24), (65, 33), (3, 576), (40, 130)):
        x, r, w, dy = (rand(*s, dtype=dtype, seed=i) for i, s in enumerate(((n, d), (n, d), (d,), (n, d))))
        total = x + r

        def norm(x: Tensor, w: Tensor) -> Tensor:
            return F.rms_norm(x, (w.numel(),), w, 1e-5)

        plain, truth = (gradients(norm, [t.to(to) for t in (total, w)], dy) for to in (dtype, torch.float64))
        found, y, rstd = ops.rms_forward(x, r, w, 1e-5)
        assert torch.equal(found, total)
        again = torch.empty_like(x)
        dx, dw = ops.rms_backward(dy, total, w, rstd, y=again)
        assert torch.equal(y, again)
        for name, one, other, exact in zip(("y", "dx", "dw"), (y, dx, dw.to(dtype)), plain, truth, strict=True):
            assert_as_good_as(one, other, exact, f"{name} {n} x {d}", terms=8 * rstd.max().item() if d < 3 else 1.0)
        out = r.clone()
        assert ops.rms_backward(dy, total, w, rstd, extra=out, out=out)[0] is out
        assert_as_good_as(out, plain[1] + r, truth[1] + r.double(), "dx + extra", terms=8.0)

        gate, up = 3 * x, r
        run = lambda g, u: F.silu(g) * u
        plain, truth = (gradients(run, [t.to(to) for t in (gate, up)], dy) for to in (dtype, torch.float64))
        both, grad = torch.cat([gate, up], 1), dy.clone()
        halves = both.chunk(2, 1)
        a = ops.swiglu_forward(*halves)
        found = ops.swiglu_backward(*halves, grad, in_place=True)
        assert torch.equal(grad, a) and found[0].data_ptr() == both.data_ptr()
        for name, one, other, exact in zip(("gated", "dgate", "dup"), (a, *halves), plain, truth, strict=True):
            assert_as_good_as(one.contiguous(), other, exact, name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation(dtype):
    ops = kernels()
    for heads, groups, dim in ((3, 1, 2), (4, 4, 16), (7, 2, 34)):
        qkv = rand(10, (heads + 2 * groups) * dim, dtype=dtype)
        half = rand(5, dim // 2, dtype=dtype), rand(5, dim // 2, dtype=dtype, seed=1)
        cos, sin = (torch.cat([t, t], 1) for t in half)
        for back in (False, True):
            one, other = qkv.clone(), qkv.clone()
            ops.rope_forward(one, cos, sin, heads + groups, dim, back=back)
            reference.rope_forward(other, cos, sin, heads + groups, dim, back=back)
            torch.testing.assert_close(one, other, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)
        grads = [rand(10, count, dim, dtype=dtype, seed=count) for count in (heads, groups, groups)]
        found, expected = ops.rope_backward(*grads, cos, sin), reference.rope_backward(*grads, cos, sin)
        torch.testing.assert_close(found, expected, rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-6)


def attend(lengths: list[int], heads: int, groups: int, dim: int, window: int | None, dtype: torch.dtype):
    """(ours, torch's in the same dtype, in float64): out, dq, dk, dv each; and the same of ours with many threads."""
    n, scale = sum(lengths), dim**-0.5
    qkv = rand(n, (heads + 2 * groups) * dim, dtype=dtype, seed=heads)
    parts = [p.unflatten(1, (-1, dim)) for p in qkv.split([heads * dim, groups * dim, groups * dim], 1)]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    grad = rand(n, heads, dim, dtype=dtype, seed=1)
    plain = lambda q, k, v: attention._by_document(q, k, v, bounds, scale, window)
    others = [gradients(plain, [p.to(to) for p in parts], grad) for to in (dtype, torch.float64)]
    ours, threads = [], torch.get_num_threads()
    try:
        for count in (1, 7):
            torch.set_num_threads(count)
            out, kept = attention.forward(*parts, bounds, max(lengths), scale, window)
            back = attention.backward(grad, *parts, out, kept, bounds, max(lengths), scale, window)
            ours.append([out, *back])
    finally:
        torch.set_num_threads(threads)
    return ours[0], *others, ours[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_against_float64(dtype):
    for lengths, heads, groups, dim, windows in (
        (LENGTHS, 6, 2, 8, (None, 1, 4)),
        ([1], 4, 4, 10, (None, 1)),
        ([61, 60, 3], 4, 4, 10, (None, 59, 61)),
        ([300, 1, 77], 9, 3, 64, (None, 70)),
        ([193], 7, 1, 80, (None, 4)),
    ):
        for window in windows:
            ours, plain, truth, threads = attend(lengths, heads, groups, dim, window, dtype)
            what = f"{lengths} {heads} {groups} {dim} {window}"
            for name, one, other, exact, again in zip(("out", *"qkv"), ours, plain, truth, threads, strict=True):
                assert torch.equal(one, again), f"{name}: threads show, {what}"
                assert_as_good_as(one.contiguous(), other, exact, f"{name} {what}", terms=8.0)


def test_attention_of_a_document_is_that_of_it_alone():
    """Bit for bit, whatever lies beside it; also where NaN does."""
    q, k, v = (rand(100, heads, 16, dtype=torch.float32, seed=heads) for heads in (4, 2, 2))
    q[:30], k[:30], v[70:] = float("nan"), float("inf"), float("nan")
    bounds = torch.tensor([0, 30, 70, 100], dtype=torch.int32)
    alone = torch.tensor([0, 40], dtype=torch.int32)
    out, kept = attention.forward(q, k, v, bounds, 40, 0.25, None)
    one, kept_one = attention.forward(q[30:70], k[30:70], v[30:70], alone, 40, 0.25, None)
    assert torch.equal(out[30:70], one) and one.isfinite().all()
    assert out[:30].isnan().all() and out[70:].isnan().all()
    back = attention.backward(out, q, k, v, out, kept, bounds, 40, 0.25, None)
    back_one = attention.backward(one, q[30:70], k[30:70], v[30:70], one, kept_one, alone, 40, 0.25, None)
    for whole, part in zip(back, back_one, strict=True):
        assert torch.equal(whole[30:70], part) and part.isfinite().all() and not whole[:30].isfinite().any()


def test_nan_and_inf_stay():
    """In bf16, too, where a NaN whose lower bits alone are set would round to infinity."""
    ops = kernels()
    payload = torch.tensor([0x7F800001], dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        x, w = torch.ones(3, 40, dtype=dtype), torch.ones(40, dtype=dtype)
        x[0, 39], x[1, 0] = float("nan"), float("inf")
        _, y, _ = ops.rms_forward(x, None, w, 1e-5)
        assert y[0].isnan().all() and y[1, 0].isnan() and (y[1, 1:] == 0).all() and y[2].isfinite().all()
        gate, up = torch.ones(2, 19, dtype=dtype), torch.ones(2, 19, dtype=dtype)
        gate[0, 18], up[1, 0] = float("nan"), float("-inf")
        a = ops.swiglu_forward(gate, up)
        assert a[0, 18].isnan() and a[1, 0] == -float("inf") and a.isfinite().sum() == 36
        qkv = torch.zeros(2, 8, dtype=dtype)
        qkv[0, 3] = float("nan")
        ops.rope_forward(qkv, torch.ones(2, 4), payload.repeat(2, 4), 2, 4)
        assert qkv.isnan().all()


def test_what_does_not_fit_is_refused():
    ops = kernels()
    x, w = torch.ones(4, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"torch.float32 on the CPU are wanted, not of torch.bfloat16"):
        ops.rms_forward(x, None, w.bfloat16(), 1e-5)
    with pytest.raises(ValueError, match="contiguous tensors are wanted"):
        ops.rms_forward(x.t(), None, torch.ones(4), 1e-5)
    with pytest.raises(ValueError, match="not an even number"):
        ops.rope_forward(x, torch.ones(4, 3), torch.ones(4, 3), 2, 3)
    q = torch.ones(4, 2, 8)
    for bounds in ([0, 5], [0, 3, 2], [-1, 4]):
        with pytest.raises(ValueError, match="among 4 tokens"):
            ops.attention_forward(q, q, q, torch.tensor(bounds, dtype=torch.int32), 1.0, None)
    with pytest.raises(ValueError, match="no multiple of groups"):
        ops.attention_forward(torch.ones(4, 3, 8), q, q, torch.tensor([0, 4], dtype=torch.int32), 1.0, None)


def test_other_dtypes_take_plain_torch():
    assert decoder.kernels(torch.ones(1, dtype=torch.float64)) is reference
    assert decoder.kernels(torch.ones(1)) is kernels()
    ours, *_ = attend([5, 3], 4, 2, 8, None, torch.float16)
    assert ours[0].dtype == torch.float16


CPU_PATH_PROGRAM = """
import sys
import torch
from fastft import _C
from tests.ops import test_decoder_cpu as tests

assert _C.cpu_path() == sys.argv[1]
torch.manual_seed(0)
for dtype in tests.DTYPES:
    tests.test_norms_and_gates_against_float64(dtype)
    tests.test_rotation(dtype)
    tests.test_attention_against_float64(dtype)
tests.test_attention_of_a_document_is_that_of_it_alone()
tests.test_nan_and_inf_stay()
"""


@pytest.mark.parametrize("path", ["scalar", *(pytest.param(p, marks=pytest.mark.long) for p in ("avx2", "avx512"))])
def test_every_cpu_path(path):
    from fastft import _C

    needs = {"scalar": [], "avx2": ["avx2", "fma"], "avx512": ["avx512f", "avx512bw", "avx512vl", "avx512dq"]}[path]
    if not all(_C.cpu_features()[feature] for feature in needs):
        pytest.skip(f"this CPU cannot run {path}")
    result = subprocess.run(
        [sys.executable, "-c", CPU_PATH_PROGRAM, path],
        env={**os.environ, "FASTFT_CPU": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr


# ---- bf16 on a CPU without instructions for it -----------------------------------------------------------------------


def layer_gradients(dtype: torch.dtype, like: torch.dtype) -> list[Tensor]:
    """Output and gradients of a fused layer whose weights and input are of `like`'s values, computed with `dtype`."""
    layer, rotary, config = family("Qwen2")
    layer.to(like).to(dtype)
    x = rand(1, sum(LENGTHS), 48, dtype=like).to(dtype).requires_grad_()
    where, _ = documents(LENGTHS, rotary, x.to(like))
    out = decoder_layer(x, where, Shape(HEADS, GROUPS, DIM, DIM**-0.5, config.rms_norm_eps), weights_of(layer))
    grads = torch.autograd.grad(out, [x, *layer.parameters()], rand(1, sum(LENGTHS), 48, dtype=like, seed=1).to(dtype))
    return [out.detach(), *grads]


def test_a_bf16_layer_is_the_float32_layer_rounded_once(monkeypatch):
    monkeypatch.setattr(processor, "cpu_multiplies_bf16", lambda: False)
    wide = layer_gradients(torch.bfloat16, torch.bfloat16)
    exact = layer_gradients(torch.float32, torch.bfloat16)
    same = []
    for one, other in zip(wide, exact, strict=True):
        rounded = other.to(torch.bfloat16)
        torch.testing.assert_close(one, rounded, rtol=8e-3, atol=1e-5)
        same.append((one == rounded).flatten())
    assert torch.cat(same).float().mean() > 0.99  # not all: weights side by side are one product, with other sums
    monkeypatch.setattr(processor, "cpu_multiplies_bf16", lambda: True)
    native = layer_gradients(torch.bfloat16, torch.bfloat16)
    for one, other in zip(native, exact, strict=True):
        assert one.dtype == torch.bfloat16 and (one.float() - other).norm() < 0.03 * other.norm()
    assert not all(torch.equal(one, other) for one, other in zip(wide, native, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_bf16_head_is_the_float32_head_rounded_once(monkeypatch, reduction):
    monkeypatch.setattr(processor, "cpu_multiplies_bf16", lambda: False)
    hidden, weight, bias = (rand(*s, dtype=torch.bfloat16) for s in ((37, 24), (100, 24), (100,)))
    target = torch.arange(37)
    target[5] = -100
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        given = [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)]
        loss = linear_cross_entropy(*given[:2], target, bias=given[2], reduction=reduction, chunk_bytes=3000)
        found.append([loss.detach(), *torch.autograd.grad(loss.sum(), given)])
    assert torch.equal(found[0][0], found[1][0]) and found[0][0].dtype == torch.float32
    for one, other in zip(found[0][1:], found[1][1:], strict=True):
        assert one.dtype == torch.bfloat16
        torch.testing.assert_close(one, other.to(torch.bfloat16), rtol=8e-3, atol=1e-6)


def test_rows_of_logits_a_page_apart_are_padded():
    """1024 float32 classes: nothing of it shows in the result."""
    hidden, weight, target = rand(9, 8), rand(1024, 8), torch.arange(9)
    truth = gradients(lambda h, w: F.cross_entropy(h @ w.t(), target), [hidden, weight], torch.ones(()))
    found = gradients(lambda h, w: linear_cross_entropy(h, w, target), [hidden.float(), weight.float()], torch.ones(()))
    for one, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-5, atol=1e-7)


def test_what_this_cpu_has_is_said():
    from fastft import _C

    said = processor.describe()
    assert said.endswith(f"bf16 instructions; kernels for {_C.cpu_path()}")
    assert ("no bf16" in said) != processor.cpu_multiplies_bf16()
    if _C.cpu_features()["avx512_bf16"]:
        assert processor.cpu_multiplies_bf16()
