"""adamw with quantized state and params: every backend bit for bit where the arithmetic is exact,
against float64 elsewhere.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from fastft.ops import adamw, quantized_state
from tests.ops.common import BACKENDS, DEVICE, NATIVE_BUILT, seeded
from tests.ops.test_adamw import HYPER, definition

each_backend = pytest.mark.parametrize("backend", BACKENDS)
F32, BF16 = torch.float32, torch.bfloat16
STATES = ("fp32", "bf16", "int8")
PARAMS = ("fp32", "bf16", "stochastic", "remainder")
COMBINATIONS = [
    (p, s) for p, s in itertools.product(PARAMS, STATES) if (p, s) not in (("fp32", "fp32"), ("bf16", "fp32"))
]
SIZES = [1, 255, 256, 257, 1027, 5003]
# Each step of the arithmetic is exact in float32: short factors, short numbers. So the roundings are all that is left
# to differ.
EXACT = {"lr": 0.5, "beta1": 0.5, "beta2": 0.5, "eps": 1.0, "weight_decay": 2.0**-10}


def make(params, state, grad_dtype=F32, sizes=SIZES, number=0):
    """The lists of a call: params of order 1, state as after some steps.

    Dyadic numbers of few bits where the dtype is wide.
    """
    g = seeded(PARAMS.index(params), STATES.index(state), number)
    short = lambda n: torch.randint(-127, 128, (n,), generator=g) * 2.0**-7
    masters = [short(n) * torch.randint(1, 255, (n,), generator=g) for n in sizes]
    lists = {
        "params": [m.clone() if params == "fp32" else m.bfloat16() for m in masters],
        "grads": [short(n).to(grad_dtype) for n in sizes],
    }
    m, v = [short(n) for n in sizes], [short(n).square() for n in sizes]
    lists["max_exp_avg_sqs"] = []
    if state == "int8":
        for name, values, signed in (("exp_avg", m, True), ("exp_avg_sq", v, False)):
            coded = [quantized_state.quantize(x, signed) for x in values]
            lists[name + "s"], lists[name + "_scales"] = [c for c, _ in coded], [s for _, s in coded]
    else:
        dtype = F32 if state == "fp32" else BF16
        lists["exp_avgs"], lists["exp_avg_sqs"] = [x.to(dtype) for x in m], [x.to(dtype) for x in v]
    if params == "remainder":
        pairs = [quantized_state.split(m) for m in masters]
        lists["params"], lists["remainders"] = [p for p, _ in pairs], [r for _, r in pairs]
    lists["steps"] = [torch.tensor(float(i)) for i in range(len(sizes))]
    return {name: [t.to(DEVICE) for t in tensors] for name, tensors in lists.items()}


def run(lists, params, backend, **options):
    lists = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    adamw(**lists, **{**HYPER, "seed": 3, "stochastic_rounding": params == "stochastic", "backend": backend, **options})
    return lists


def decoded(lists, i):
    """(param, exp_avg, exp_avg_sq) as float32."""
    p = (
        quantized_state.join(lists["params"][i], lists["remainders"][i])
        if "remainders" in lists
        else lists["params"][i].float()
    )
    if "exp_avg_scales" not in lists:
        return p, lists["exp_avgs"][i].float(), lists["exp_avg_sqs"][i].float()
    m = quantized_state.dequantize(lists["exp_avgs"][i], lists["exp_avg_scales"][i], True)
    return p, m, quantized_state.dequantize(lists["exp_avg_sqs"][i], lists["exp_avg_sq_scales"][i], False)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name in one:
        for i, (a, b) in enumerate(zip(one[name], other[name], strict=True)):
            a, b = (t.view(torch.int16) if t.dtype == BF16 else t for t in (a, b))
            assert torch.equal(a, b), f"{name}[{i}]: {(a != b).sum()} of {a.numel()} differ"


def exact(params, state, backend, grad_dtype=F32, sizes=SIZES, **options):
    """One step in which no arithmetic rounds: without gradient and exp_avg the param only decays;
    the state takes one more call.
    """
    lists = make(params, state, grad_dtype, sizes)
    first = run(lists, params, backend, **{**EXACT, "lr": 0.0, **options})
    still = {
        **lists,
        "grads": [torch.zeros_like(g) for g in lists["grads"]],
        "exp_avgs": [torch.zeros_like(m) for m in lists["exp_avgs"]],
    }
    second = run(still, params, backend, **{**EXACT, **options})
    return {**{"first " + k: v for k, v in first.items()}, **{"second " + k: v for k, v in second.items()}}


@pytest.mark.parametrize("grad_dtype", [F32, BF16])
@pytest.mark.parametrize(("params", "state"), COMBINATIONS)
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_every_backend_rounds_to_the_same_bits(backend, params, state, grad_dtype):
    offsets = [
        2**33 - 700 + 7 * i for i in range(len(SIZES))
    ]  # the upper half of the index changes inside some tensors
    ours, reference = (
        exact(params, state, b, grad_dtype, offsets=offsets, seed=2**62 + 5) for b in (backend, "reference")
    )
    if backend == "triton" and DEVICE == "cpu" and params == "bf16":  # its interpreter truncates where a GPU rounds
        ours, reference = ({k: v for k, v in r.items() if "params" not in k} for r in (ours, reference))
    assert_equal(ours, reference)
    changed = exact(params, state, backend, grad_dtype, offsets=offsets, seed=2**62 + 6)
    if state != "fp32" or params == "stochastic":
        assert any(not torch.equal(a, b) for k in ours for a, b in zip(ours[k], changed[k], strict=True)), (
            "the seed changes nothing"
        )


CPU_PATH_PROGRAM = """
import sys, torch
from fastft import _C
from tests.ops import test_adamw_quantized as t
assert _C.cpu_path() == sys.argv[1]
for params, state in t.COMBINATIONS:
    t.assert_equal(t.exact(params, state, "native", t.BF16), t.exact(params, state, "reference", t.BF16))
    t.test_matches_float64("native", params, state)
"""


@pytest.mark.parametrize("path", ["scalar", *(pytest.param(p, marks=pytest.mark.long) for p in ("avx2", "avx512"))])
@pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
def test_every_cpu_path(path):
    from fastft import _C

    needs = {"scalar": [], "avx2": ["avx2", "fma"], "avx512": ["avx512f", "avx512bw", "avx512vl", "avx512dq"]}[path]
    if not all(_C.cpu_features()[feature] for feature in needs):
        pytest.skip(f"this CPU cannot run {path}")
    command = [sys.executable, "-c", CPU_PATH_PROGRAM, path]
    result = subprocess.run(
        command, env={**os.environ, "FASTFT_CPU": path}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def neighbours(x, state, signed):
    """Distance between the two numbers of this storage around x: what stochastic rounding may be off by."""
    if state == "fp32":
        return 1e-6 * x.abs() + 1e-9
    if state == "bf16":
        return 2.0**-7 * x.abs() + 1e-9
    top = (
        torch.nn.functional.pad(x.abs().flatten(), (0, -x.numel() % 256))
        .view(-1, 256)
        .amax(1)
        .repeat_interleave(256)[: x.numel()]
    )
    return 0.126 * x.abs() + top * 2.0 ** (-16 if signed else -32)


@pytest.mark.parametrize(("params", "state"), COMBINATIONS)
@each_backend
def test_matches_float64(backend, params, state):
    """Each result lies within one rounding of the truth from the stored inputs;
    with a remainder the master is as good as float32.
    """
    before = make(params, state, BF16, number=1)
    after = run(before, params, backend)
    for i in range(len(SIZES)):
        inputs = decoded(before, i)
        p, m, v, _, step = definition(
            *(t.double() for t in (inputs[0], before["grads"][i], *inputs[1:])),
            None,
            before["steps"][i].double(),
            **HYPER,
        )
        assert after["steps"][i] == step
        ours = decoded(after, i)
        for name, got, truth, room in (
            (
                "param",
                ours[0],
                p,
                2.0**-7 * p.abs() + 1e-6 if params in ("bf16", "stochastic") else 3e-7 * p.abs() + 3e-7,
            ),
            ("exp_avg", ours[1], m, neighbours(m, state, True) + 1e-7),
            ("exp_avg_sq", ours[2], v, neighbours(v, state, False)),
        ):
            excess = (got.double() - truth).abs() - room
            assert (excess <= 0).all(), f"{name}: off by {excess.max().item():.3g} more than one rounding"


@pytest.mark.parametrize(("params", "state"), COMBINATIONS)
@each_backend
def test_trap_a_shard_is_rounded_as_the_whole(backend, params, state):
    """Whatever the cut (on a block's border, where there are blocks),
    the pieces with their offsets give the bits of the whole.
    """
    n, cut = 1500, 512 if state == "int8" else 701
    whole = make(params, state, sizes=[n])
    after = run(whole, params, backend, offsets=[100])
    parts = []
    for begin, end in ((0, cut), (cut, n)):
        part = {k: [t[begin:end] if t.numel() == n else t for t in v] for k, v in whole.items()}
        for k in set(whole) & {"exp_avg_scales", "exp_avg_sq_scales"}:
            part[k] = [t[begin // 256 : -(-end // 256)] for t in whole[k]]
        parts.append(run(part, params, backend, offsets=[100 + begin]))
    for k in after:
        if k != "steps" and after[k]:
            assert torch.equal(torch.cat([part[k][0] for part in parts]), after[k][0]), k


@pytest.mark.parametrize(("params", "state"), [("stochastic", "bf16"), ("remainder", "int8"), ("fp32", "int8")])
@each_backend
def test_trap_inf_skip_leaves_everything(backend, params, state):
    before = make(params, state)
    before["grads"] = [torch.full_like(g, torch.inf) for g in before["grads"]]
    assert_equal(run(before, params, backend, found_inf=torch.tensor(1.0, device=DEVICE)), before)


@each_backend
def test_trap_nan_is_seen_in_8_bits(backend):
    """A NaN gradient that nobody stopped turns the state of its block, and of no other, into NaN."""
    before = make("fp32", "int8", sizes=[600])
    before["grads"][0][300] = torch.nan
    _, m, v = decoded(run(before, "fp32", backend), 0)
    for x in (m, v):
        assert x[256:512].isnan().all() and not x[:256].isnan().any() and not x[512:].isnan().any()


@each_backend
def test_stochastic_rounding_has_the_exact_mean(backend):
    """Over many elements the mean of what was rounded is the truth; to nearest it would be off by up to half a unit."""
    n, target = 200_000, 1.0 + 2.0**-9  # a quarter of the way from 1 to the next bfloat16
    lists = {
        "params": [torch.ones(n, dtype=BF16, device=DEVICE)],
        "grads": [torch.zeros(n, device=DEVICE)],
        "max_exp_avg_sqs": [],
        "exp_avgs": [torch.full((n,), 2 * target - 1, device=DEVICE)],
        "exp_avg_sqs": [torch.zeros(n, device=DEVICE)],
        "steps": [torch.zeros((), device=DEVICE)],
    }
    options = {"lr": 2.0**-9, "weight_decay": -1.0, "beta1": 0.5, "beta2": 0.5, "eps": 1e30}
    after = run(lists, "stochastic", backend, **options)["params"][0].double()
    assert set(after.unique().tolist()) == {1.0, 1.0078125}
    assert after.mean().item() == pytest.approx(target, abs=5 * 0.0078125 * (3 / 16 / n) ** 0.5)


@pytest.mark.parametrize("state", ["bf16", "int8"])
@each_backend
def test_trap_a_decaying_exp_avg_sq_does_not_stall(backend, state):
    """beta2 = 0.999 without gradients: after 1000 steps exp_avg_sq is 0.37 of what it was.

    To nearest, bfloat16 would never move.
    """
    n, steps = 2048, 50 if backend == "triton" else 1000
    x = torch.rand(n, generator=seeded(0)) + 0.5
    lists = {
        "params": [torch.zeros(n)],
        "grads": [torch.zeros(n)],
        "exp_avgs": [torch.zeros(n)],
        "max_exp_avg_sqs": [],
        "steps": [torch.zeros(())],
    }
    if state == "bf16":
        lists |= {"exp_avg_sqs": [x.bfloat16()], "exp_avgs": [torch.zeros(n, dtype=BF16)]}
    else:
        codes, scales = quantized_state.quantize(x, False)
        zero, zero_scales = quantized_state.quantize(torch.zeros(n), True)
        lists |= {
            "exp_avg_sqs": [codes],
            "exp_avg_sq_scales": [scales],
            "exp_avgs": [zero],
            "exp_avg_scales": [zero_scales],
        }
    lists = {k: [t.to(DEVICE) for t in v] for k, v in lists.items()}
    start = decoded(lists, 0)[2].double().sum()
    for _ in range(steps):
        adamw(**lists, **HYPER, seed=1, backend=backend)
    left = decoded(lists, 0)[2].double().sum() / start
    assert left.item() == pytest.approx(0.999**steps, rel=0.01)
    nearest = x.bfloat16()
    assert torch.equal((nearest.float() * 0.999).bfloat16(), nearest), "the trap is none"


@each_backend
def test_remainder_trains_bit_for_bit_like_a_float32_master(backend):
    """The same bfloat16 gradients, 20 steps: the pair is the fp32 master, and the param its nearest bfloat16."""
    master = torch.randn(3001, generator=seeded(1)).to(DEVICE)
    param, remainder = quantized_state.split(master)
    zeros = lambda *_: torch.zeros(3001, device=DEVICE)
    wide = {
        "params": [master],
        "exp_avgs": [zeros()],
        "exp_avg_sqs": [zeros()],
        "steps": [torch.zeros((), device=DEVICE)],
    }
    pair = {
        "params": [param],
        "exp_avgs": [zeros()],
        "exp_avg_sqs": [zeros()],
        "steps": [torch.zeros((), device=DEVICE)],
    }
    for step in range(20):
        grads = [torch.randn(3001, generator=seeded(2, step)).to(DEVICE, BF16)]
        adamw(**wide, grads=grads, max_exp_avg_sqs=[], **HYPER, backend=backend)
        adamw(**pair, grads=grads, max_exp_avg_sqs=[], remainders=[remainder], **HYPER, backend=backend)
        assert torch.equal(quantized_state.join(param, remainder), master)
        below = (master - param.float()).abs()
        assert (below <= (master - param.nextafter(master.sign().to(BF16) * torch.inf).float()).abs()).all()
        assert (below <= (master - param.nextafter(-master.sign().to(BF16) * torch.inf).float()).abs()).all()


WRONG = {
    "remainder_fp32": (
        ("fp32", "bf16"),
        {"remainders": [torch.zeros(n, dtype=torch.int16) for n in SIZES]},
        "remainders is for bfloat16",
    ),
    "stochastic_fp32": (("fp32", "bf16"), {"stochastic_rounding": True}, "stochastic_rounding is for bfloat16 params"),
    "both": (("remainder", "bf16"), {"stochastic_rounding": True}, "exclude each other"),
    "copies": (
        ("remainder", "bf16"),
        {"copies": [torch.zeros(n, dtype=BF16) for n in SIZES]},
        "copies are for wider params",
    ),
    "amsgrad": (
        ("fp32", "int8"),
        {"max_exp_avg_sqs": [torch.zeros(n) for n in SIZES]},
        "amsgrad needs float32 or bfloat16",
    ),
    "one_scale": (("fp32", "int8"), {"exp_avg_sq_scales": None}, "come together"),
    "no_scales": (
        ("fp32", "int8"),
        {"exp_avg_scales": None, "exp_avg_sq_scales": None},
        r"exp_avgs\[0\] must be .*comes with scales",
    ),
    "scale_shape": (
        ("fp32", "int8"),
        {"exp_avg_scales": [torch.zeros(1) for _ in SIZES]},
        r"exp_avg_scales\[3\] must be \(2,\)",
    ),
    "mixed": (
        ("fp32", "bf16"),
        {"exp_avg_sqs": [torch.zeros(n) for n in SIZES]},
        "exp_avg_sqs.0. must be torch.bfloat16",
    ),
    "remainder_dtype": (
        ("remainder", "fp32"),
        {"remainders": [torch.zeros(n) for n in SIZES]},
        "remainders.0. must be torch.int16",
    ),
    "seed": (("fp32", "bf16"), {"seed": -1}, "seed must be"),
    "offset": (("fp32", "bf16"), {"offsets": [-1] * len(SIZES)}, "none is negative"),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="the cases are on the CPU")
@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    kind, changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        adamw(**{**make(*kind), **HYPER, **changes})


@each_backend
def test_opcheck(backend):
    module = sys.modules["fastft.ops.adamw"]
    for params, state in (("stochastic", "int8"), ("remainder", "bf16")):
        lists = make(params, state, sizes=[5, 300])
        names = (
            "params",
            "grads",
            "exp_avgs",
            "exp_avg_sqs",
            "max_exp_avg_sqs",
            "steps",
            "copies",
            "remainders",
            "exp_avg_scales",
            "exp_avg_sq_scales",
        )
        tensors = [lists.get(name, []) for name in names]
        numbers = (7, params == "stochastic", 0.1, 0.9, 0.999, 1e-8, 0.1, True, False)
        torch.library.opcheck(module._op, (*tensors, [0, 300], None, None, None, *numbers, backend))


@each_backend
def test_trap_non_contiguous(backend):
    """Positions are those of the flat tensor in its own order, not of memory."""
    for params, state in (("stochastic", "bf16"), ("remainder", "int8")):
        plain = {
            k: [t.view(30, 20) if t.numel() == 600 else t for t in v]
            for k, v in make(params, state, sizes=[600]).items()
        }
        strange = {k: [t.T.contiguous().T if t.ndim == 2 else t.clone() for t in v] for k, v in plain.items()}
        expected = run(plain, params, backend)
        adamw(**strange, **HYPER, seed=3, stochastic_rounding=params == "stochastic", backend=backend)
        assert_equal(strange, expected)
