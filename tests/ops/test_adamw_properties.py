"""Properties of adamw over drawn shapes, strides, dtypes and flags:
native against the reference, and what must not change.
"""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from fastft.ops import adamw, quantized_state
from tests.ops.common import NATIVE_BUILT

pytestmark = pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
settings = hypothesis.settings(max_examples=80, deadline=None)

F32, BF16 = torch.float32, torch.bfloat16
SHAPES = st.lists(st.integers(0, 40), min_size=0, max_size=3).map(tuple) | st.integers(0, 700).map(lambda n: (n,))
LAYOUTS = st.sampled_from(["contiguous", "transposed", "every_other", "offset"])


@st.composite
def calls(draw):
    """(lists, options) of one call with one to three tensors."""
    kind = draw(st.sampled_from(["fp32", "bf16", "stochastic", "remainder"]))
    state = draw(st.sampled_from(["fp32", "bf16", "int8"]))
    grad_dtype = draw(st.sampled_from([F32, BF16]))
    amsgrad = state != "int8" and draw(st.booleans())
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    names = (
        "params",
        "grads",
        "exp_avgs",
        "exp_avg_sqs",
        "max_exp_avg_sqs",
        "steps",
        "remainders",
        "exp_avg_scales",
        "exp_avg_sq_scales",
        "copies",
    )
    lists = {name: [] for name in names}
    copies = kind in ("fp32", "bf16") and draw(st.booleans())
    for _ in range(draw(st.integers(1, 3))):
        shape, layout = draw(SHAPES), draw(LAYOUTS)
        normal = lambda scale, shape=shape: torch.randn(shape, generator=g) * scale
        master, m, v = normal(1.0), normal(0.1), normal(0.1).square()
        lists["params"].append(laid_out(master if kind == "fp32" else master.bfloat16(), layout))
        lists["grads"].append(laid_out(normal(1.0).to(grad_dtype), draw(LAYOUTS)))
        lists["steps"].append(torch.tensor(float(draw(st.integers(0, 1000)))))
        if kind == "remainder":
            lists["remainders"].append(torch.randint(-(2**15), 2**15, shape, generator=g, dtype=torch.int16))
        if copies:
            lists["copies"].append(torch.zeros(shape, dtype=BF16))
        if state == "int8":
            for name, x in (("exp_avg", m), ("exp_avg_sq", v)):
                codes, scales = quantized_state.quantize(x, name == "exp_avg")
                lists[name + "s"].append(codes)
                lists[name + "_scales"].append(scales)
        else:
            for name, x in (("exp_avgs", m), ("exp_avg_sqs", v), *([("max_exp_avg_sqs", v * 1.5)] if amsgrad else [])):
                lists[name].append(laid_out(x.to(F32 if state == "fp32" else BF16), layout))
    flags = {name: draw(st.booleans()) for name in ("decoupled", "maximize")}
    numbers = {
        "lr": 1e-2,
        "beta1": draw(st.sampled_from([0.0, 0.5, 0.9])),
        "beta2": draw(st.sampled_from([0.5, 0.999])),
        "eps": 1e-6,
        "weight_decay": 0.1,
    }
    scale = draw(st.none() | st.sampled_from([0.25, 3.0]).map(torch.tensor))
    options = {
        **flags,
        **numbers,
        "grad_scale": scale,
        "seed": draw(st.integers(0, 2**63 - 1)),
        "stochastic_rounding": kind == "stochastic",
        "offsets": [draw(st.integers(0, 2**40)) for _ in lists["params"]],
    }
    return lists, options


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """x with other strides, or at an odd address."""
    if layout == "transposed" and x.ndim >= 2:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every_other" and x.ndim:
        return torch.repeat_interleave(x, 2, dim=-1)[..., ::2]
    if layout == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


def run(lists, options, backend):
    kept = {}
    for name, tensors in lists.items():  # clones of the same strides, gaps included
        kept[name] = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t) for t in tensors]
    adamw(
        **{
            **kept,
            **{name: kept[name] or None for name in ("remainders", "exp_avg_scales", "exp_avg_sq_scales", "copies")},
        },
        **options,
        backend=backend,
    )
    return kept


def numbers(lists, i):
    p = lists["params"][i].float()
    if lists["remainders"]:
        p = quantized_state.join(lists["params"][i], lists["remainders"][i])
    if not lists["exp_avg_scales"]:
        return {"param": p, "exp_avg": lists["exp_avgs"][i].float(), "exp_avg_sq": lists["exp_avg_sqs"][i].float()}
    m = quantized_state.dequantize(lists["exp_avgs"][i], lists["exp_avg_scales"][i], True)
    return {
        "param": p,
        "exp_avg": m,
        "exp_avg_sq": quantized_state.dequantize(lists["exp_avg_sqs"][i], lists["exp_avg_sq_scales"][i], False),
    }


@settings
@hypothesis.given(calls())
def test_native_does_what_the_reference_does(call):
    """Equal up to float32 noise, which may flip a rounding to the neighbour:
    almost all elements then agree to 1e-5, all to one unit.
    """
    lists, options = call
    ours, theirs = (run(lists, options, backend) for backend in ("native", "reference"))
    for i in range(len(lists["params"])):
        assert ours["steps"][i] == theirs["steps"][i] == lists["steps"][i] + 1
        for name, a in numbers(ours, i).items():
            b = numbers(theirs, i)[name]
            off = (a - b).abs()
            room = 0.126 * b.abs() + 2.0**-13 * b.abs().max() if b.numel() else b
            assert (off <= room + 1e-6).all(), name
            assert (off > 1e-5 * b.abs() + 1e-6).sum() <= 2 + a.numel() // 50, (
                f"{name}: {(off > 1e-5 * b.abs() + 1e-6).sum()} of {a.numel()}"
            )
    for grad, given in zip(ours["grads"], lists["grads"], strict=True):
        assert torch.equal(grad, given), "a gradient was written to"


@settings
@hypothesis.given(calls())
def test_native_is_the_same_from_run_to_run_and_whatever_the_strides(call):
    lists, options = call
    first = run(lists, options, "native")
    again = run({name: [t.contiguous() for t in tensors] for name, tensors in lists.items()}, options, "native")
    for name in first:
        assert all(torch.equal(a, b) for a, b in zip(first[name], again[name], strict=True)), name


@settings
@hypothesis.given(calls())
def test_found_inf_writes_nothing(call):
    lists, options = call
    after = run(lists, {**options, "found_inf": torch.tensor(1.0)}, "native")
    for name in lists:
        assert all(torch.equal(a, b) for a, b in zip(after[name], lists[name], strict=True)), name


FINITE = st.floats(min_value=-(2.0**100), max_value=2.0**100, width=32, allow_subnormal=True)


@settings
@hypothesis.given(st.lists(FINITE, max_size=600), st.booleans(), st.integers(0, 2**16 - 1))
def test_coding_what_was_decoded_changes_nothing(values, signed, random):
    """Codes and scales come back bit for bit, however the second coding rounds; the error is within one step."""
    x = torch.tensor(values, dtype=F32)
    x = x if signed else x.abs()
    draw = lambda r: torch.full_like(x, r, dtype=torch.int64)
    codes, scales = quantized_state.quantize(x, signed, draw(random))
    decoded = quantized_state.dequantize(codes, scales, signed)
    for r in (0, 0x8000, 0xFFFF):
        again, same = quantized_state.quantize(decoded, signed, draw(r))
        assert torch.equal(codes, again) and torch.equal(scales, same)
    step = torch.maximum(x.abs() / 8, scales.repeat_interleave(256)[: len(x)] * 2.0 ** (-17 if signed else -33))
    assert ((decoded - x).abs() <= step).all()
    assert (decoded[x > 0] > 0).all() or signed


@settings
@hypothesis.given(st.lists(st.floats(width=32), max_size=200))
def test_split_and_join_are_inverse(values):
    x = torch.tensor(values, dtype=F32)
    param, remainder = quantized_state.split(x)
    back = quantized_state.join(param, remainder)
    assert torch.equal(back[~x.isnan()].view(torch.int32), x[~x.isnan()].view(torch.int32))
    assert back[x.isnan()].isnan().all() and param[x.isnan()].isnan().all()
    ok = x.isfinite() & x.bfloat16().isfinite() & param.isfinite()
    assert ((param.float() - x).abs()[ok] <= (x.bfloat16().float() - x).abs()[ok]).all()
