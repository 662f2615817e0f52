"""adamw against float64, over backend x dtypes x options, and the traps by name."""

import os
import subprocess
import sys

import pytest
import torch

from fastft.ops import adamw
from tests.ops.common import (
    BACKENDS,
    DEVICE,
    NATIVE,
    NATIVE_BUILT,
    assert_as_good_as,
    assert_rounded_once,
    rounded,
    seeded,
)

module = sys.modules["fastft.ops.adamw"]  # the package's attribute of that name is the function
each_backend = pytest.mark.parametrize("backend", BACKENDS)

F32, BF16 = torch.float32, torch.bfloat16
DTYPES = [(F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32)]  # param, grad
SHAPES = [(252, 123), (1,), (0,), (1027,), (), (3, 5, 7)]
HYPER = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1}
OPTIONS = {
    "adamw": {},
    "l2": {"decoupled": False},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "no_decay": {"weight_decay": 0.0},
    "tensor_lr": {"lr": "tensor"},
    "grad_scale": {"grad_scale": 0.37},
    "found_inf_is_zero": {"found_inf": 0.0},
    "copies": {"copies": True},
    "all": {"amsgrad": True, "decoupled": False, "maximize": True, "grad_scale": 3.0, "found_inf": 0.0, "copies": True},
}
TERMS = {
    "params": 1.0,
    "exp_avgs": 0.1,
    "exp_avg_sqs": 0.0,
    "max_exp_avg_sqs": 0.0,
}  # sizes of what may cancel in a sum
STATES = ("params", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "steps")


def make(param_dtype, grad_dtype, shapes=SHAPES, first_step=0):
    """A dict of lists: params and grads of order 1, state as after some steps, or zeros before the first."""
    g = seeded(len(shapes), DTYPES.index((param_dtype, grad_dtype)), first_step)
    draw = lambda shape: torch.randn(shape, generator=g)
    scale = 0.0 if first_step == 0 else 1.0
    lists = {
        "params": [draw(s).to(param_dtype) for s in shapes],
        "grads": [draw(s).to(grad_dtype) for s in shapes],
        "exp_avgs": [draw(s) * scale * 0.1 for s in shapes],
        "exp_avg_sqs": [draw(s).square() * scale * 0.01 for s in shapes],
        "max_exp_avg_sqs": [draw(s).square() * scale * 0.01 for s in shapes],
        "steps": [torch.tensor(float(first_step + 3 * i if first_step else 0)) for i in range(len(shapes))],
    }
    return {name: [t.to(DEVICE) for t in tensors] for name, tensors in lists.items()}


def definition(
    p,
    g,
    m,
    v,
    v_max,
    step,
    *,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    amsgrad=False,
    decoupled=True,
    maximize=False,
    grad_scale=1.0,
):
    """torch.optim.AdamW's rules on tensors of one dtype; float64 gives the truth, float32 the usual error."""
    g = g * grad_scale * (-1 if maximize else 1)
    g = g if decoupled else g + weight_decay * p
    t = float(step) + 1
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    v_max = torch.maximum(v_max, v) if amsgrad else v_max
    denominator = (v_max if amsgrad else v).sqrt() / (1 - beta2**t) ** 0.5 + eps
    p = p * (1 - lr * weight_decay) if decoupled else p
    return p - lr / (1 - beta1**t) * m / denominator, m, v, v_max, torch.tensor(t)


def run(lists, backend, *, amsgrad=False, copies=None, **options):
    """Call adamw on clones; returns the updated dict."""
    lists = {name: [t.clone() for t in tensors] for name, tensors in lists.items()}
    if copies:
        lists["copies"] = [torch.zeros_like(p, dtype=BF16) for p in lists["params"]]
    options = {**HYPER, **options}
    for name in ("lr", "grad_scale", "found_inf"):
        if name in options and (name != "lr" or options["lr"] == "tensor"):
            value = HYPER["lr"] if name == "lr" else options[name]
            options[name] = torch.tensor(value, device=DEVICE)
    adamw(
        *(lists[name] if name != "max_exp_avg_sqs" or amsgrad else [] for name in ("params", "grads", *STATES[1:])),
        copies=lists.get("copies"),
        backend=backend,
        **options,
    )
    return lists


@pytest.mark.parametrize("first_step", [0, 5])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtypes", DTYPES)
@each_backend
def test_matches_float64(backend, dtypes, name, first_step):
    before = make(*dtypes, first_step=first_step)
    options = {k: v for k, v in OPTIONS[name].items() if k not in ("found_inf", "copies")}
    options = {**HYPER, **options, "lr": HYPER["lr"]}
    if "grad_scale" in options:
        options["grad_scale"] = torch.tensor(options["grad_scale"]).item()  # float32's value of it
    after = run(before, backend, **OPTIONS[name])
    for i, shape in enumerate(SHAPES):
        inputs = [before[key][i] for key in ("params", "grads", *STATES[1:])]
        truth = definition(*(t.double() for t in inputs), **options)
        base = definition(*(t.float() for t in inputs), **options)
        for key, true, single in zip(STATES, truth, base, strict=True):
            ours = after[key][i]
            if key == "steps":
                assert ours.item() == before["steps"][i].item() + 1
            elif ours.numel():
                what = f"{key} {shape}"
                terms = TERMS[key]
                assert_as_good_as(ours, rounded(single, ours.dtype, backend), true, what, terms=terms)
                assert_rounded_once(ours, true, what, backend, terms=terms)
        if "copies" in after and after["copies"][i].numel():
            copy = after["copies"][i]
            assert_rounded_once(copy, truth[0], f"copy {shape}", backend, terms=1.0)
            if dtypes[0] == BF16:
                assert torch.equal(copy, after["params"][i])


@each_backend
def test_many_steps_stay_as_close_as_torchs(backend):
    """30 steps on fresh gradients: parameters against float64, with torch.optim.AdamW's own error as the measure."""
    ours = make(F32, F32, [(11, 13)])
    results = {}
    for dtype in (torch.float64, F32):
        param = torch.nn.Parameter(ours["params"][0].to(dtype).clone())
        optimizer = torch.optim.AdamW([param], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, foreach=False)
        for step in range(30):
            param.grad = torch.randn(11, 13, generator=seeded(step)).to(DEVICE, dtype)
            optimizer.step()
        results[dtype] = param.detach()
    for step in range(30):
        ours["grads"] = [torch.randn(11, 13, generator=seeded(step)).to(DEVICE)]
        ours = run(ours, backend)
    assert_as_good_as(ours["params"][0], results[F32], results[torch.float64], "param", terms=8.0)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES)
@each_backend
def test_trap_inf_skip_leaves_state_and_step(backend, dtypes, amsgrad):
    before = make(*dtypes, first_step=5)
    for grad in before["grads"]:
        grad.fill_(torch.inf)
    after = run(before, backend, amsgrad=amsgrad, found_inf=1.0, copies=True)
    for key in STATES:
        assert all(torch.equal(a, b) for a, b in zip(after[key], before[key], strict=True)), key
    assert all((copy == 0).all() for copy in after["copies"])


@each_backend
def test_trap_one_minus_beta2_in_double(backend):
    """1 - 0.999f is 1.3e-5 off, relatively; at the first step v is nothing else."""
    before = make(F32, F32, [(1000,)])
    after = run(before, backend)
    truth = 0.001 * before["grads"][0].double().square()
    torch.testing.assert_close(after["exp_avg_sqs"][0].double(), truth, rtol=3e-7, atol=0)


@each_backend
def test_trap_bias_correction_late(backend):
    """Steps that float32 still counts, with beta close to 1: beta^t in float32 would be off in the fourth digit."""
    before = make(F32, F32, [(1000,)], first_step=5)
    before["steps"][0].fill_(100_000)
    after = run(before, backend, beta2=0.99999)
    inputs = [before[key][0].double() for key in ("params", "grads", *STATES[1:])]
    truth = definition(*inputs, **{**HYPER, "beta2": 0.99999})[0]
    assert_rounded_once(after["params"][0], truth, "param", backend)


@each_backend
def test_trap_many_tiny_params_each_with_its_own_step(backend):
    shapes = [(1 + i % 3,) for i in range(300)]
    before = make(F32, F32, shapes, first_step=1)
    after = run(before, backend)
    for i in range(len(shapes)):
        truth = definition(*(before[key][i].double() for key in ("params", "grads", *STATES[1:])), **HYPER)
        assert_rounded_once(after["params"][i], truth[0], f"param {i}", backend, terms=1.0)
    assert [s.item() for s in after["steps"]] == [s.item() + 1 for s in before["steps"]]


@each_backend
def test_trap_mixed_dtypes_in_one_call(backend):
    """Grouping by dtype must neither lose a tensor nor step one twice."""
    parts = [make(*dtypes, [(7, 3)], first_step=5 + i) for i, dtypes in enumerate(DTYPES)]
    mixed = {key: [part[key][0] for part in parts] for key in parts[0]}
    together = run(mixed, backend, amsgrad=True)
    for i, part in enumerate(parts):
        alone = run(part, backend, amsgrad=True)
        for key in STATES:
            assert torch.equal(together[key][i], alone[key][0]), key


@each_backend
def test_trap_empty_list_and_empty_tensors(backend):
    adamw([], [], [], [], [], [], **HYPER, backend=backend)
    after = run(make(F32, F32, [(0,), (0, 5)]), backend)
    assert [s.item() for s in after["steps"]] == [1, 1]


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "every_other": lambda t: torch.repeat_interleave(t, 2, dim=1)[:, ::2],
    "expanded_grad": None,
    "contiguous": lambda t: t.clone(),
}


@pytest.mark.parametrize("others", LAYOUTS)
@pytest.mark.parametrize("params", [name for name in LAYOUTS if name != "expanded_grad"])
@each_backend
def test_trap_non_contiguous(backend, params, others):
    plain = make(F32, BF16, [(6, 10)], first_step=5)
    if others == "expanded_grad":
        plain["grads"] = [plain["grads"][0][:1].expand(6, 10).contiguous()]
    expected = run(plain, backend, amsgrad=True, copies=True)
    strange = {name: [LAYOUTS[others](t) if t.ndim and others != "expanded_grad" else t.clone() for t in tensors]
               for name, tensors in plain.items()}  # fmt: skip
    strange["params"] = [LAYOUTS[params](plain["params"][0])]
    if others == "expanded_grad":
        strange["grads"] = [plain["grads"][0][:1].expand(6, 10)]
    copy = torch.zeros(10, 6, dtype=BF16, device=DEVICE).T
    adamw(*(strange[name] for name in ("params", "grads", *STATES[1:])), copies=[copy], **HYPER, backend=backend)
    for key in STATES:
        assert torch.equal(strange[key][0], expected[key][0]), key
    assert torch.equal(copy, expected["copies"][0])


@each_backend
def test_copies_may_be_given_for_some(backend):
    before = make(F32, F32, [(5,), (6,)])
    copy = torch.zeros(6, dtype=BF16, device=DEVICE)
    adamw(
        *(before[k] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs")),
        [],
        before["steps"],
        copies=[None, copy],
        **HYPER,
        backend=backend,
    )
    torch.testing.assert_close(copy.float(), before["params"][1], rtol=8e-3, atol=0)
    assert [s.item() for s in before["steps"]] == [1, 1]


@pytest.mark.parametrize("dtypes", DTYPES)
@each_backend
def test_trap_bitwise_the_same_from_run_to_run(backend, dtypes):
    before = make(*dtypes, first_step=5)
    first, second = (run(before, backend, amsgrad=True, copies=True) for _ in range(2))
    assert all(torch.equal(a, b) for key in first for a, b in zip(first[key], second[key], strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_reference(dtype):
    before = make(F32, F32, [(20,)], first_step=5)
    truth = definition(*(before[key][0].to(dtype).double() for key in ("params", "grads")),
                       *(before[key][0].double() for key in STATES[1:]), **HYPER)  # fmt: skip
    for key in ("params", "grads"):
        before[key] = [before[key][0].to(dtype)]
    if dtype == torch.float64:
        for key in STATES[1:4]:
            before[key] = [before[key][0].double()]
    after = run(before, None)
    torch.testing.assert_close(after["params"][0], truth[0].to(dtype))


@pytest.mark.parametrize("name", ["adamw", "all"])
@each_backend
def test_opcheck(backend, name):
    lists = make(F32, BF16, [(5, 3), (4,)], first_step=2)
    everything = name == "all"
    copies = [torch.zeros_like(p, dtype=BF16) for p in lists["params"]] if everything else []
    scalar = torch.tensor(0.0, device=DEVICE) if everything else None
    lr_tensor = torch.tensor(0.1, device=DEVICE) if everything else None
    tensors = [lists[key] if key != "max_exp_avg_sqs" or everything else [] for key in ("params", "grads", *STATES[1:])]
    numbers = (0.1, 0.9, 0.999, 1e-8, 0.1, True, False)
    torch.library.opcheck(
        module._op, (*tensors, copies, [], [], [], [], lr_tensor, scalar, scalar, 0, False, *numbers, backend)
    )


@pytest.mark.parametrize("backend", [NATIVE, *(pytest.param(b, marks=pytest.mark.long) for b in ("reference", None))])
def test_trap_torch_compile_fullgraph(backend):
    eager, compiled = (make(F32, F32, [(5, 3), (4,)], first_step=2) for _ in range(2))

    def step(lists):
        adamw(*(lists[key] for key in ("params", "grads", *STATES[1:])), **HYPER, backend=backend)

    torch._dynamo.reset()
    step(eager)
    torch.compile(step, fullgraph=True)(compiled)
    for key in STATES:
        assert all(torch.equal(a, b) for a, b in zip(eager[key], compiled[key], strict=True)), key


def _wrong(**changes):
    lists = make(F32, F32, [(3, 3)])
    lists.update({key: [value] if isinstance(value, torch.Tensor) else value for key, value in changes.items()})
    return lists


WRONG = {
    "length": (lambda: _wrong(grads=[]), ValueError, "1 params, but 0 grads"),
    "shape": (lambda: _wrong(grads=torch.zeros(9)), ValueError, r"grads\[0\] must be \(3, 3\)"),
    "step_shape": (lambda: _wrong(steps=torch.zeros(1)), ValueError, r"steps\[0\] must be \(\)"),
    "step_dtype": (lambda: _wrong(steps=torch.tensor(1)), ValueError, r"steps\[0\] must be torch.float32"),
    "state_dtype": (
        lambda: _wrong(exp_avgs=torch.zeros(3, 3, dtype=torch.float16)),
        ValueError,
        "exp_avgs.0. must be torch.float32 or",
    ),
    "device": (lambda: _wrong(exp_avgs=torch.zeros(3, 3, device="meta")), ValueError, "on meta"),
    "sparse": (lambda: _wrong(grads=torch.zeros(3, 3).to_sparse()), RuntimeError, "dense gradients only"),
    "complex": (lambda: _wrong(grads=torch.zeros(3, 3, dtype=torch.complex64)), RuntimeError, "real floating"),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="the cases are on the CPU")
@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    lists, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        adamw(*(lists()[key] for key in ("params", "grads", *STATES[1:])), **HYPER)


CPU_PATH_PROGRAM = """
import sys
from fastft import _C
from tests.ops.test_adamw import DTYPES, HYPER, STATES, definition, make, run
from tests.ops.common import assert_rounded_once
assert _C.cpu_path() == sys.argv[1]
for dtypes in DTYPES:
    before = make(*dtypes, [(1027,), (5,), (33, 17)], first_step=5)
    after = run(before, "native", amsgrad=True)
    for i in range(3):
        truth = definition(*(before[k][i].double() for k in ("params", "grads", *STATES[1:])), **HYPER, amsgrad=True)
        for key, true in zip(STATES[:4], truth):
            assert_rounded_once(after[key][i], true, key, "native")
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


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: 2^31 elements with state are 26 GB")
@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_trap_indexing_over_2_31(backend):
    n = 2**31 + 1000
    param, grad = (torch.ones(n, dtype=BF16, device="cuda") for _ in range(2))
    m, v = (torch.zeros(n, device="cuda") for _ in range(2))
    step = torch.zeros((), device="cuda")
    adamw([param], [grad], [m], [v], [], [step], **HYPER, backend=backend)
    for i in (0, 2**31 - 1, 2**31, n - 1):
        assert m[i].item() == pytest.approx(0.1) and v[i].item() == pytest.approx(1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_backend
def test_trap_cuda_graph_capture_sees_a_new_lr(backend):
    captured, eager = (make(F32, F32, [(5, 3), (4,)], first_step=2) for _ in range(2))
    lr = torch.tensor(1e-2, device="cuda")
    step = lambda lists: adamw(
        *(lists[key] for key in ("params", "grads", *STATES[1:])), **{**HYPER, "lr": lr}, backend=backend
    )
    warm = make(F32, F32, [(5, 3), (4,)], first_step=2)
    step(warm)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(captured)
    lr.fill_(3e-2)
    graph.replay()
    step(eager)
    for key in STATES:
        assert all(torch.equal(a, b) for a, b in zip(captured[key], eager[key], strict=True)), key
