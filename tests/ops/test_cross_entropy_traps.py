"""Each trap that other cross-entropy kernels fell into, by name."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torch.utils._python_dispatch

from fastft.ops import backends, bad_target, cross_entropy, cross_entropy_common, linear_cross_entropy, sum_squares
from tests.ops.common import BACKENDS, DEVICE, NATIVE, NATIVE_BUILT, assert_rounded_once, seeded
from tests.ops.test_cross_entropy import formula, loss_and_gradient, make

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton.runtime.interpreter"
)  # numpy on nan, which is meant
each_backend = pytest.mark.parametrize("backend", BACKENDS)
REDUCTIONS = ("mean", "sum", "none")
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def small(*, requires_grad=True, rows=6, vocab=11, dtype=torch.float32):
    g = seeded(rows, vocab)
    logits = torch.randn(rows, vocab, generator=g).to(dtype).to(DEVICE).requires_grad_(requires_grad)
    return logits, torch.randint(0, vocab, (rows,), generator=g).to(DEVICE)


@each_reduction
@each_backend
def test_trap_all_rows_ignored(backend, reduction):
    logits, target = small()
    target.fill_(-100)
    loss, grad = loss_and_gradient(
        cross_entropy, logits, target, torch.ones(6, device=DEVICE), reduction=reduction, backend=backend
    )
    assert (loss == 0).all() and (grad == 0).all()


@each_backend
def test_trap_ignored_rows_write_zero_whatever_their_logits(backend):
    logits, target = small(requires_grad=False)
    logits[1], logits[2, 3], logits[4] = -math.inf, math.nan, math.inf
    target[[1, 2, 4]] = -100
    for reduction in ("none", "mean"):
        upstream = torch.ones(6, device=DEVICE)
        loss, grad = loss_and_gradient(cross_entropy, logits, target, upstream, reduction=reduction, backend=backend)
        assert torch.isfinite(loss).all()
        assert (grad[[1, 2, 4]] == 0).all() and (grad[[0, 3, 5]] != 0).all()
        assert reduction == "mean" or (loss[[1, 2, 4]] == 0).all()


@pytest.mark.parametrize("bad", [11, -1, 2**40])
@each_reduction
@each_backend
def test_trap_out_of_range_target(backend, reduction, bad):
    logits, target = small()
    target[3] = bad
    if DEVICE == "cpu":
        with pytest.raises(
            IndexError, match=rf"target {bad} at position 3 is neither in \[0, 11\) nor ignore_index \(-100\)"
        ):
            cross_entropy(logits, target, reduction=reduction, backend=backend)
    else:
        loss = cross_entropy(logits, target, reduction=reduction, backend=backend)
        assert loss.isnan().sum() == 1
        assert bad_target(DEVICE) == 3 and bad_target(DEVICE) == -1


@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_trap_out_of_range_target_of_the_reference_spoils_its_own_row(op, monkeypatch):
    """As on CUDA, where nothing is raised: nan and gradient 0 there, the other rows as they are."""
    monkeypatch.setattr(cross_entropy_common, "report_bad_row", lambda *_: None)
    logits, target = small()
    target[3] = 11
    run = {
        "cross_entropy": lambda **o: cross_entropy(logits, target, backend="reference", **o),
        "linear_cross_entropy": lambda **o: linear_cross_entropy(
            logits, torch.eye(11, device=DEVICE), target, backend="reference", **o
        ),
    }[op]
    rows = run(reduction="none")
    assert rows.isnan().tolist() == [False, False, False, True, False, False]
    for loss in (rows.sum(), run(reduction="mean"), run(reduction="sum")):
        assert loss.isnan()
        (grad,) = torch.autograd.grad(loss, logits)
        assert (grad[3] == 0).all() and torch.isfinite(grad).all() and (grad[[0, 1, 2, 4, 5]] != 0).all()


@pytest.mark.parametrize("poison", [-math.inf, math.nan])
@each_backend
def test_trap_row_of_minus_inf_or_nan(backend, poison):
    logits, target = small(requires_grad=False)
    logits[2] = poison
    upstream = torch.ones(6, device=DEVICE)
    loss, grad = loss_and_gradient(cross_entropy, logits, target, upstream, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, False, True, False, False, False]
    assert grad[2].isnan().all() and torch.isfinite(grad[[0, 1, 3, 4, 5]]).all()
    assert cross_entropy(logits, target, backend=backend).isnan()


@each_backend
def test_trap_one_nan_logit(backend):
    logits, target = small(requires_grad=False)
    logits[2, 5] = math.nan
    loss, grad = loss_and_gradient(
        cross_entropy, logits, target, torch.ones(6, device=DEVICE), reduction="none", backend=backend
    )
    assert loss.isnan().sum() == 1 and loss[2].isnan() and grad[2].isnan().all()


@each_backend
def test_trap_masked_classes_of_minus_inf(backend):
    """Vocabulary masks: some logits -inf. They get probability and gradient 0, also when they come first."""
    logits, target = small(requires_grad=False, vocab=9000)
    logits[:, :8500] = -math.inf
    target.clamp_(min=8600)
    loss, grad = loss_and_gradient(cross_entropy, logits, target, None, backend=backend)
    true_loss, true_grad = loss_and_gradient(formula, logits.double(), target, None)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-4, atol=1e-8)


@each_backend
def test_trap_reduction_none_with_an_uneven_upstream(backend):
    logits, target, _ = make((29, 507), "plain", torch.float32)
    upstream = torch.rand(58, generator=seeded(3)).to(DEVICE)[::2]  # not contiguous either
    _, grad = loss_and_gradient(cross_entropy, logits, target, upstream, reduction="none", backend=backend)
    _, truth = loss_and_gradient(formula, logits.double(), target, upstream.double(), reduction="none")
    assert_rounded_once(grad, truth, "gradient", backend)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.5])
@each_backend
def test_trap_second_backward(backend, factor, inplace):
    leaf, target = small()
    loss = factor * cross_entropy(leaf * 1, target, inplace=inplace, backend=backend)
    first, second, third = (torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone() for _ in range(3))
    assert torch.equal(first, second) and torch.equal(first, third) and first.abs().sum() > 0
    (last,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(first, last)


@each_reduction
@each_backend
def test_trap_second_backward_accumulates_in_a_leaf(backend, reduction):
    """What the first backward gave away must not be what the second hands out again."""
    logits, target = small()
    loss = cross_entropy(logits, target, reduction=reduction, backend=backend).sum()
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        if times == 1:
            once = logits.grad.clone()
        torch.testing.assert_close(logits.grad, times * once)


@each_reduction
@each_backend
def test_trap_callers_logits_unchanged(backend, reduction):
    logits, target = small()
    before = logits.detach().clone()
    version = logits._version
    cross_entropy(logits, target, reduction=reduction, backend=backend).sum().backward()
    assert torch.equal(logits.detach(), before) and logits._version == version


@each_backend
def test_trap_in_place_under_someone_elses_feet(backend):
    """tanh keeps its output for its backward; overwriting it must be an error, not a wrong gradient."""
    leaf, target = small()
    loss = cross_entropy(torch.tanh(leaf), target, inplace=True, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("how", ["no_grad", "frozen"])
@each_reduction
@pytest.mark.parametrize("backend", [NATIVE])
def test_trap_no_gradient_is_computed_when_none_is_needed(backend, reduction, how, monkeypatch):
    seen = []
    real = backends.implementation("cross_entropy", backend)
    spy = lambda *args, **kwargs: (seen.append(kwargs["grad"]), real(*args, **kwargs))
    monkeypatch.setitem(backends._loaded, ("cross_entropy", backend), spy)
    logits, target = small(requires_grad=how != "frozen")
    with torch.set_grad_enabled(how != "no_grad"):
        loss = cross_entropy(logits, target, reduction=reduction, backend=backend)
    assert seen == [None] and not loss.requires_grad


class _LargeResults(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the ops that return a new array of at least `numel` elements."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        results = result if isinstance(result, tuple) else (result,)
        if any(isinstance(r, torch.Tensor) and r.numel() >= self.numel for r in results):
            self.names.append(str(func))
        return result


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, "cross_entropy"), ({"reduction": "none"}, "cross_entropy_rows_backward"), ({"inplace": True}, None)],
)
@pytest.mark.parametrize("backend", [NATIVE])
def test_trap_one_large_array_at_most(backend, options, expected):
    """The gradient is the only (N, V) array; autograd would add one of zeros as the gradient of the saved gradient."""
    leaf, target = small()
    logits = leaf * 1
    with _LargeResults(logits.numel()) as made:
        loss = cross_entropy(logits, target, backend=backend, **options).sum()
        (grad,) = torch.autograd.grad(loss, logits)
    names = [name for name in made.names if not name.startswith(("aten.view", "aten._unsafe_view", "aten.detach"))]
    assert names == ([f"fastft.{expected}.default"] if expected else [])
    assert (grad.data_ptr() == logits.data_ptr()) == ("inplace" in options)


@each_backend
def test_trap_gradient_scaled_before_it_is_rounded(backend):
    """1e-6 times a bfloat16 gradient would round twice."""
    logits, target, _ = make((29, 507), "plain", torch.bfloat16)
    options = {"reduction": "sum", "token_weight": torch.tensor(1 / 999_983, device=DEVICE)}
    _, grad = loss_and_gradient(cross_entropy, logits, target, None, backend=backend, **options)
    _, truth = loss_and_gradient(formula, logits.double(), target, None, **options)
    assert_rounded_once(grad, truth, "gradient", backend)


@each_backend
def test_trap_loss_is_float32_and_lse_minus_x(backend):
    """-log(softmax) gives 0 for a sure row and inf for a lost one; bfloat16 gives 3 digits."""
    logits = torch.zeros(3, 8, dtype=torch.bfloat16, device=DEVICE)
    logits[:, 0] = torch.tensor([9.0, 9.0, 300.0])
    target = torch.tensor([0, 1, 1], device=DEVICE)
    loss = cross_entropy(logits, target, reduction="none", backend=backend)
    assert loss.dtype == torch.float32
    truth = formula(logits.double(), target, reduction="none")
    # The sum of exponentials is 1.0009 in float32, good to about three of its units of 1.2e-7, in whatever order it is
    # taken. The reference subtracts float32 numbers of size 9, so it knows the loss to 1e-6 only.
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=1e-6 if backend == "reference" else 4e-7)


@each_backend
def test_trap_target_gradient_in_float32(backend):
    """p - 1 with p in bfloat16 is 0 as soon as the model is sure."""
    logits = torch.zeros(1, 8, device=DEVICE)
    logits[0, 3] = 9.0
    target = torch.tensor([3], device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        _, grad = loss_and_gradient(cross_entropy, logits.to(dtype), target, None, backend=backend)
        _, truth = loss_and_gradient(formula, logits.double(), target, None)
        torch.testing.assert_close(grad.double(), truth, rtol=8e-3 if dtype == torch.bfloat16 else 1e-3, atol=0)


@each_backend
def test_trap_int64_labels_unaligned(backend):
    logits, target, _ = make((29, 507), "plain", torch.float32)
    shifted = torch.cat([target[:1], target])[1:]
    assert shifted.data_ptr() % 16 == 8
    assert torch.equal(
        cross_entropy(logits, shifted, backend=backend), cross_entropy(logits, target.clone(), backend=backend)
    )


VIEWS = {
    "every_other_row": lambda x: x[::2],
    "part_of_the_columns": lambda x: x[:, 3:40],
    "transposed": lambda x: x.T,
    "every_other_column": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(5, -1),
    "shifted_rows": lambda x: x.reshape(4, 5, -1)[:, :-1],
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("view", VIEWS)
@each_backend
def test_trap_non_contiguous_logits(backend, view, inplace):
    if inplace and view == "expanded":
        pytest.skip("torch refuses to write to it")
    leaf = torch.randn(20, 48, generator=seeded(5)).to(DEVICE).requires_grad_()
    logits = VIEWS[view](leaf * 1)
    target = torch.randint(0, logits.shape[-1], logits.shape[:-1], generator=seeded(6)).to(DEVICE)
    (grad,) = torch.autograd.grad(cross_entropy(logits, target, inplace=inplace, backend=backend), leaf)
    contiguous = VIEWS[view](leaf).double().flatten(0, -2)
    (truth,) = torch.autograd.grad(formula(contiguous, target.flatten()), leaf)
    torch.testing.assert_close(grad, truth)


@each_reduction
@each_backend
def test_trap_bitwise_the_same_from_run_to_run(backend, reduction):
    logits, target, options = make((29, 507), "all", torch.bfloat16)
    upstream = torch.rand(29, generator=seeded(9)).to(DEVICE)
    runs = [
        loss_and_gradient(cross_entropy, logits, target, upstream, reduction=reduction, backend=backend, **options)
        for _ in range(3)
    ]
    for loss, grad in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(grad, runs[0][1])


COMPILED = [
    pytest.param("native", r, marks=[*NATIVE.marks, *([pytest.mark.long] if r != "mean" else [])]) for r in REDUCTIONS
]
COMPILED += [pytest.param(b, r, marks=pytest.mark.long) for b in ("reference", None) for r in REDUCTIONS]


@pytest.mark.parametrize(("backend", "reduction"), COMPILED)
def test_trap_torch_compile_fullgraph(backend, reduction):
    leaf, target = small()
    target[1] = -100

    def step(leaf, target, inplace):
        loss, lse = cross_entropy(
            leaf * 1, target, reduction=reduction, softcap=5.0, return_lse=True, inplace=inplace, backend=backend
        )
        return (3.0 * loss).sum() + lse.sum()  # a factor, so that the backward has to multiply

    for inplace in (False, True) if reduction != "none" else (False,):
        torch._dynamo.reset()
        eager, compiled = (function(leaf, target, inplace) for function in (step, torch.compile(step, fullgraph=True)))
        torch.testing.assert_close(compiled, eager)
        torch.testing.assert_close(torch.autograd.grad(compiled, leaf)[0], torch.autograd.grad(eager, leaf)[0])


@pytest.mark.parametrize("backend", [NATIVE, pytest.param("reference", marks=pytest.mark.long)])
def test_trap_out_of_range_target_under_torch_compile(backend):
    logits, target = small()
    target[3] = 11
    torch._dynamo.reset()
    if DEVICE == "cpu":
        with pytest.raises(IndexError, match="at position 3"):
            torch.compile(lambda x, y: cross_entropy(x, y, backend=backend), fullgraph=True)(logits, target)


@pytest.mark.parametrize("backend", [NATIVE])
def test_trap_double_backward_is_refused_not_wrong(backend):
    logits, target = small()
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(cross_entropy(logits, target, backend=backend), logits, create_graph=True)


@pytest.mark.slow
@pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
def test_trap_indexing_over_2_31():
    """33 rows beyond element 2^31 of bfloat16 logits, 4.3 GB, gradient in place."""
    vocab = 131072
    rows = 2**31 // vocab + 33
    logits = torch.full((rows, vocab), -8.0, dtype=torch.bfloat16, device=DEVICE)
    target = torch.full((rows,), -100, device=DEVICE)
    checked = [0, rows // 2, rows - 34, rows - 33, rows - 2]
    values = torch.randn(len(checked), vocab, generator=seeded(8)).bfloat16().to(DEVICE)
    logits[checked] = values
    target[checked] = torch.tensor([5, 131071, 0, 77, 130000], device=DEVICE)
    leaf = torch.ones((), device=DEVICE, requires_grad=True)
    tracked = _TrackedWithoutACopy.apply(leaf, logits)
    loss = cross_entropy(tracked, target, inplace=True, backend="native", reduction="sum")
    true_loss, true_grad = loss_and_gradient(formula, values.double(), target[checked], None, reduction="sum")
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(logits[checked].double(), true_grad, rtol=5e-3, atol=1e-9)
    assert (logits[rows - 1] == 0).all() and (logits[rows - 32] == 0).all()  # ignored rows on both sides


class _TrackedWithoutACopy(torch.autograd.Function):
    """Makes big logits part of a graph; leaf * logits would need a second 4.3 GB."""

    @staticmethod
    def forward(ctx, leaf, logits):
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx, grad):
        return None, None


CPU_PATH_PROGRAM = """
import sys, torch
from fastft import _C
from fastft.ops import cross_entropy
from tests.ops.test_cross_entropy import OPTIONS, make, loss_and_gradient, formula
from tests.ops.common import assert_rounded_once
assert _C.cpu_path() == sys.argv[1]
for dtype in (torch.float32, torch.bfloat16):
    for shape in ((5, 507), (3, 31), (2, 1)):
        for name in ("plain", "all") if shape[1] > 1 else ("plain",):
            logits, target, options = make(shape, name, dtype)
            _, grad = loss_and_gradient(cross_entropy, logits, target, None, backend="native", **options)
            _, truth = loss_and_gradient(formula, logits.double(), target, None, **options)
            assert_rounded_once(grad, truth, f"{name} {shape} {dtype}", "native", terms=8 * truth.abs().max().item())
"""


@pytest.mark.parametrize("path", ["scalar", *(pytest.param(p, marks=pytest.mark.long) for p in ("avx2", "avx512"))])
@pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_no_host_sync(backend):
    logits, target = small(dtype=torch.bfloat16)
    cross_entropy(logits, target, backend=backend).backward()  # compile the kernels first
    torch.cuda.set_sync_debug_mode("error")
    try:
        (2.0 * cross_entropy(logits, target, backend=backend)).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_cuda_graph_capture(backend):
    logits, target = small(dtype=torch.bfloat16)

    def step():
        return torch.autograd.grad(2.0 * cross_entropy(logits, target, backend=backend), logits)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.normal_()
    graph.replay()
    assert torch.equal(captured, step())


def test_in_place_compiles_with_a_dimension_that_changes():
    torch.compiler.reset()
    f = torch.compile(lambda y, t: cross_entropy(y * 2, t, inplace=True), fullgraph=True, backend="aot_eager")
    for n in (6, 9, 12):  # the second length makes the dimension dynamic
        x, t = torch.randn(n, 11, requires_grad=True), torch.randint(0, 11, (n,))
        want = F.cross_entropy(x * 2, t)
        got = f(x, t)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(*(torch.autograd.grad(loss, x)[0] for loss in (got, want)))


HEAD = torch.nn.Parameter(torch.randn(11, 8, generator=torch.Generator().manual_seed(0)))
LOSSES = {
    "cross_entropy": lambda h, t, **more: cross_entropy(h @ HEAD.detach().t(), t, **more),
    "linear_cross_entropy": lambda h, t, **more: linear_cross_entropy(h, HEAD.detach(), t, **more),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("op", LOSSES)
def test_torch_func_gets_right_answers(op, reduction):
    """grad, vmap, grad of grad, jvp and forward-mode differentiation: torch's own values, ignored targets too."""
    generator = torch.Generator().manual_seed(1)
    h, t = torch.randn(6, 8, generator=generator), torch.randint(0, 11, (6,), generator=generator)
    t[2] = -100

    def ours(x, target=t):
        return LOSSES[op](x, target, reduction=reduction).sum()

    def torchs(x, target=t):
        return F.cross_entropy(x @ HEAD.detach().t(), target, reduction=reduction).sum()

    batch, targets = torch.randn(3, 6, 8, generator=generator), t.expand(3, 6)
    for transform in (
        lambda f: torch.func.grad(f)(h),
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum())(h),
        lambda f: torch.func.vmap(f)(batch, targets),
        lambda f: torch.func.vmap(torch.func.grad(f))(batch, targets),
        lambda f: torch.func.jvp(f, (h,), (torch.ones_like(h),))[1],
        lambda f: torch.func.hessian(f)(h),
        lambda f: _forward_mode(f, h),
    ):
        torch.testing.assert_close(transform(ours), transform(torchs), atol=1e-5, rtol=1e-4)
    assert torch.func.vmap(ours)(batch, torch.full((3, 6), 11)).isnan().all(), "out of range is never silent"


def _forward_mode(f, x):
    import torch.autograd.forward_ad as forward_ad

    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def test_what_has_no_rule_for_transforms_says_so():
    x = torch.randn(4)
    with pytest.raises(RuntimeError, match="sum_squares has no rule"):
        torch.func.grad(lambda y: sum_squares([y]).float())(x)


@pytest.mark.parametrize("op", LOSSES)
def test_nothing_is_ignored(op):
    h, t = torch.randn(4, 8), torch.tensor([0, 1, 2, 4])
    torch.testing.assert_close(LOSSES[op](h, t, ignore_index=None), LOSSES[op](h, t))
    with pytest.raises(IndexError, match="-100"):
        LOSSES[op](h, torch.tensor([0, -100, 1, 2]), ignore_index=None)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_linear_cross_entropy_under_autocast(reduction):
    """float32 tensors, and a hidden state that a layer before made bfloat16; some rows are ignored."""
    generator = torch.Generator().manual_seed(0)
    h, w = (torch.randn(n, 8, generator=generator, requires_grad=True) for n in (6, 11))
    t = torch.tensor([1, -100, 2, 3, -100, 4])
    want = F.cross_entropy(h @ w.t(), t, reduction=reduction)
    wanted = torch.autograd.grad(want.sum(), (h, w))
    for hidden in (h, h.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            got = linear_cross_entropy(hidden, w, t, reduction=reduction)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=5e-2, rtol=2e-2)
        found = torch.autograd.grad(got.sum(), (h, w))
        assert [g.dtype for g in found] == [torch.float32] * 2
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=5e-2, rtol=5e-2)
