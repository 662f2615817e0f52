"""Each trap that fused linear cross-entropies fell into, by name."""

import math

import pytest
import torch
import torch.nn.functional as F
import torch.utils._python_dispatch

from fastft.ops import backends, bad_target, linear_cross_entropy
from tests.ops.common import BACKENDS, DEVICE, NATIVE, seeded
from tests.ops.test_linear_cross_entropy import formula, in_dtype, loss_and_gradients, make

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton.runtime.interpreter"
)  # numpy on nan, which is meant
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
only_native = pytest.mark.parametrize("backend", [NATIVE])
CHUNK = 3 * 11 * 4  # bytes of three rows of small()


def small(*, rows=10, width=7, vocab=11, dtype=torch.float32):
    """(hidden, weight, target) on DEVICE, the former two wanting gradients."""
    g = seeded(rows, width, vocab)
    hidden, weight = (torch.randn(n, width, generator=g).to(dtype).to(DEVICE).requires_grad_() for n in (rows, vocab))
    return hidden, weight, torch.randint(0, vocab, (rows,), generator=g).to(DEVICE)


@each_reduction
@each_backend
def test_trap_all_rows_ignored(backend, reduction):
    hidden, weight, target = small()
    bias = torch.ones(11, device=DEVICE, requires_grad=True)
    loss = linear_cross_entropy(
        hidden,
        weight,
        torch.full_like(target, -100),
        bias=bias,
        reduction=reduction,
        backend=backend,
        chunk_bytes=CHUNK,
    )
    grads = torch.autograd.grad(loss.sum(), (hidden, weight, bias))
    assert (loss == 0).all() and all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(
    "return_lse", [False, True]
)  # with it, ignored rows stay in the computation, as they do on CUDA
@each_reduction
@each_backend
def test_trap_ignored_rows_count_for_nothing_whatever_they_hold(backend, reduction, return_lse):
    """0 * inf in the GEMM of dW is nan."""
    hidden, weight, target = small()
    low_rank = [torch.randn(n, 2, generator=seeded(n)).to(DEVICE).requires_grad_() for n in (10, 11)]
    target[[1, 5, 8]] = -100
    options = {"reduction": reduction, "backend": backend}

    def grads(**more):
        loss = linear_cross_entropy(hidden, weight, target, low_rank=low_rank, **options, **more)
        loss = loss[0] if return_lse else loss
        assert reduction != "none" or (loss[[1, 5, 8]] == 0).all()
        return loss.detach(), *torch.autograd.grad(loss.sum(), (hidden, weight, *low_rank))

    clean = grads(chunk_bytes=CHUNK, return_lse=return_lse)
    with torch.no_grad():
        hidden[1], hidden[5, 3], low_rank[0][8] = math.inf, math.nan, -math.inf
    for a, b in zip(grads(chunk_bytes=CHUNK, return_lse=return_lse), clean, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bad", [11, -1, 2**40])
@each_reduction
@each_backend
def test_trap_out_of_range_target_is_named_by_its_place_in_the_input(backend, reduction, bad):
    """Not by its place in a chunk, nor among the rows that are not ignored."""
    hidden, weight, target = small()
    target[:3], target[8] = -100, bad
    if DEVICE == "cpu":
        with pytest.raises(
            IndexError, match=rf"target {bad} at position 8 is neither in \[0, 11\) nor ignore_index \(-100\)"
        ):
            linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend, chunk_bytes=CHUNK)
    else:
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend, chunk_bytes=CHUNK)
        assert loss.isnan().sum() == 1
        assert bad_target(DEVICE) == 8 and bad_target(DEVICE) == -1


@each_reduction
@each_backend
def test_trap_nan_in_a_row_that_counts_is_not_lost(backend, reduction):
    hidden, weight, target = small()
    with torch.no_grad():
        hidden[4, 2] = math.nan
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend)
    assert loss.isnan().sum() == 1
    assert torch.autograd.grad(loss.sum(), weight)[0].isnan().any()


@pytest.mark.parametrize("factor", [1.0, 2.5])
@each_reduction
@each_backend
def test_trap_second_backward(backend, reduction, factor):
    hidden, weight, target = small()
    loss = factor * linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend).sum()
    first, second = (
        [g.clone() for g in torch.autograd.grad(loss, (hidden, weight), retain_graph=True)] for _ in range(2)
    )
    loss.backward(retain_graph=True)
    loss.backward()  # what the first one gave away must not be what this one hands out
    for a, b, leaf in zip(first, second, (hidden, weight), strict=True):
        assert torch.equal(a, b) and a.abs().sum() > 0
        torch.testing.assert_close(leaf.grad, 2 * a)
    with pytest.raises(RuntimeError, match="second"):
        loss.backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
@only_native
def test_trap_double_backward_is_an_error_not_a_zero(backend, reduction):
    hidden, weight, target = small()
    loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend).sum()
    with pytest.raises(RuntimeError):
        torch.autograd.grad(torch.autograd.grad(loss, hidden, create_graph=True)[0].sum(), weight)


class _Results(torch.utils._python_dispatch.TorchDispatchMode):
    """(name of the op, shape) of every new array below the custom ops too."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, torch.Tensor)
        }
        for r in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(r, torch.Tensor) and r.untyped_storage().data_ptr() not in known:
                self.made.append((str(func), tuple(r.shape)))
        return result


def arrays_of_a_run(monkeypatch, backend, wanted, **options):
    """Shapes of the arrays that the chunk loop makes for the gradients of `wanted`."""
    hidden, weight, target = small(rows=40, width=8, vocab=100)
    hidden.requires_grad_("hidden" in wanted), weight.requires_grad_("weight" in wanted)
    real, made = backends.implementation("linear_cross_entropy", backend), []

    def spy(*args, **kwargs):
        with _Results() as results:
            grads = real(*args, **kwargs)
        made.extend(results.made)
        return grads

    monkeypatch.setitem(backends._loaded, ("linear_cross_entropy", backend), spy)
    loss = linear_cross_entropy(hidden, weight, target, backend=backend, chunk_bytes=400 * 10, **options).sum()
    if wanted:
        loss.backward()
    assert (hidden.grad is not None) == ("hidden" in wanted) and (weight.grad is not None) == ("weight" in wanted)
    return [shape for _, shape in made]


@each_reduction
@only_native
def test_trap_never_more_logits_than_a_chunk(backend, reduction, monkeypatch):
    shapes = arrays_of_a_run(monkeypatch, backend, {"hidden", "weight"}, reduction=reduction)
    assert max(math.prod(s) for s in shapes if s[-1:] == (100,)) == 10 * 100
    assert max(math.prod(s) for s in shapes) <= 10 * 100


@pytest.mark.parametrize("wanted", [set(), {"hidden"}, {"weight"}, {"hidden", "weight"}])
@each_reduction
@only_native
def test_trap_only_the_gradients_that_are_needed(backend, reduction, wanted, monkeypatch):
    """Frozen head, frozen input, no gradient at all: nothing of the size of the others is made."""
    shapes = arrays_of_a_run(monkeypatch, backend, wanted, reduction=reduction)
    assert ((100, 8) in shapes) == ("weight" in wanted)
    assert ((40, 8) in shapes) == ("hidden" in wanted)


@pytest.mark.parametrize("how", ["no_grad", "frozen", "inference"])
@each_reduction
@only_native
def test_trap_no_gradient_is_computed_when_none_is_needed(backend, reduction, how, monkeypatch):
    seen = []
    monkeypatch.setattr("fastft.ops.native.module", _spy_module(seen))
    hidden, weight, target = small()
    if how == "frozen":
        hidden, weight = hidden.detach(), weight.detach()
    context = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "frozen": torch.enable_grad}[how]
    with context():
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend)
    assert seen == [0] and not loss.requires_grad


def _spy_module(seen):
    """fastft._C whose cross_entropy notes the address of the gradient it is to write."""
    from fastft import _C

    class Spy:
        F32, BF16 = _C.F32, _C.BF16
        build_info = staticmethod(_C.build_info)  # asked on a GPU whether this build has kernels for it

        @staticmethod
        def cross_entropy(**kwargs):
            seen.append(kwargs["grad"])
            _C.cross_entropy(**kwargs)

    return lambda: Spy


@only_native
def test_trap_weight_gradient_is_not_copied_into_the_leaf(backend):
    """Whoever keeps a second reference to it makes autograd clone (V, H) at the end of every step."""
    hidden, weight, target = small(rows=40, width=8, vocab=100)
    loss = linear_cross_entropy(hidden * 1, weight, target, backend=backend)
    with _Results() as results:
        loss.backward()
    assert not [name for name, shape in results.made if shape == (100, 8)]


@each_reduction
@each_backend
def test_trap_inputs_unchanged(backend, reduction):
    hidden, weight, target = small()
    before = [t.detach().clone() for t in (hidden, weight, target)]
    versions = [t._version for t in (hidden, weight, target)]
    linear_cross_entropy(
        hidden, weight, target, reduction=reduction, backend=backend, chunk_bytes=CHUNK
    ).sum().backward()
    assert all(torch.equal(a.detach(), b) for a, b in zip((hidden, weight, target), before, strict=True))
    assert versions == [t._version for t in (hidden, weight, target)]


@only_native
def test_trap_weight_gradient_summed_in_float32(backend):
    """bfloat16 sums over many chunks stop growing: 512 chunks of one row must be as good as one GEMM over all rows."""
    g = seeded(4)
    tensors = {
        "hidden": 1 + 0.1 * torch.randn(512, 24, generator=g),
        "weight": torch.randn(40, 24, generator=g),
        "bias": torch.randn(40, generator=g),
    }
    tensors = {key: t.bfloat16().to(DEVICE) for key, t in tensors.items()}
    target = torch.zeros(512, dtype=torch.int64, device=DEVICE)
    _, truth = loss_and_gradients(formula, in_dtype(tensors, torch.float64), target)
    errors = {}
    for chunk_bytes in (1, 2**30):
        _, grads = loss_and_gradients(linear_cross_entropy, tensors, target, backend=backend, chunk_bytes=chunk_bytes)
        errors[chunk_bytes] = [
            (grads[key].double() - truth[key]).abs().max() / truth[key].abs().max() for key in ("weight", "bias")
        ]
    for many, one in zip(errors[1], errors[2**30], strict=True):
        assert many <= 1.5 * one + 1e-3


@each_backend
def test_trap_gradient_scaled_before_it_is_rounded(backend):
    """1 / tokens is a factor of the logits' gradient in float32;
    multiplied afterwards it would round every gradient twice.
    """
    tensors, target, _ = make((29, 31, 507), "plain", torch.bfloat16)
    options = {"reduction": "sum", "backend": backend}
    unit = loss_and_gradients(linear_cross_entropy, tensors, target, **options)[1]
    for power in (2**-20, 2**10):  # exact factors change nothing but the exponent
        scaled = loss_and_gradients(
            linear_cross_entropy, tensors, target, token_weight=torch.tensor(power, device=DEVICE), **options
        )[1]
        assert all(torch.equal(scaled[key], unit[key] * power) for key in unit)


@each_backend
def test_trap_loss_is_float32(backend):
    tensors, target, _ = make((29, 31, 507), "plain", torch.bfloat16)
    loss, _ = loss_and_gradients(linear_cross_entropy, tensors, target, backend=backend)
    assert loss.dtype == torch.float32 and loss.bfloat16().float() != loss


VIEWS = {
    "every_other_row": lambda x: torch.repeat_interleave(x, 2, dim=0)[::2],
    "part_of_the_columns": lambda x: torch.cat([x, x], -1)[:, : x.shape[1]],
    "transposed": lambda x: x.T.contiguous().T,
    "every_other_column": lambda x: torch.repeat_interleave(x, 2, dim=1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape[0], -1),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@only_native
def test_trap_non_contiguous(backend, reduction, view):
    hidden, weight, target = small()
    strange = [VIEWS[view](t) for t in (hidden, weight)]
    strange_target = torch.stack([target, target], -1)[:, 0]
    loss = linear_cross_entropy(*strange, strange_target, reduction=reduction, backend=backend, chunk_bytes=CHUNK)
    plain = linear_cross_entropy(
        *(t.contiguous() for t in strange), target, reduction=reduction, backend=backend, chunk_bytes=CHUNK
    )
    torch.testing.assert_close(loss, plain)
    pairs = zip(
        torch.autograd.grad(loss.sum(), (hidden, weight)),
        torch.autograd.grad(plain.sum(), (hidden, weight)),
        strict=True,
    )
    for ours, expected in pairs:
        torch.testing.assert_close(ours, expected)


@each_backend
def test_trap_tied_weight_gets_both_gradients(backend):
    _, weight, target = small()
    weight.grad = None
    loss = linear_cross_entropy(torch.tanh(F.embedding(target, weight)), weight, target.roll(1), backend=backend)
    plain = F.cross_entropy(F.linear(torch.tanh(F.embedding(target, weight)), weight), target.roll(1))
    torch.testing.assert_close(torch.autograd.grad(loss, weight)[0], torch.autograd.grad(plain, weight)[0])


@each_reduction
@each_backend
def test_trap_bitwise_the_same_from_run_to_run(backend, reduction):
    tensors, target, options = make((29, 31, 507), "all", torch.bfloat16)
    upstream = torch.rand(29, generator=seeded(9)).to(DEVICE)
    runs = [
        loss_and_gradients(
            linear_cross_entropy,
            tensors,
            target,
            upstream,
            reduction=reduction,
            backend=backend,
            chunk_bytes=9 * 507 * 2,
            **options,
        )
        for _ in range(3)
    ]
    for loss, grads in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and all(torch.equal(grads[key], runs[0][1][key]) for key in grads)


COMPILED = [("aot_eager", None, r) for r in ("mean", "sum", "none")] + [
    ("aot_eager", "reference", "mean"),
    pytest.param("inductor", None, "mean", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("compiler", "backend", "reduction"), COMPILED)
def test_trap_torch_compile_fullgraph(compiler, backend, reduction):
    hidden, weight, target = small()
    target[1] = -100
    low_rank = [torch.randn(n, 2, generator=seeded(n)).to(DEVICE).requires_grad_() for n in (10, 11)]
    leaves = (hidden, weight, *low_rank)

    def step(hidden, weight, hidden2, weight2, target):
        loss, lse = linear_cross_entropy(
            hidden * 1,
            weight,
            target,
            low_rank=(hidden2, weight2),
            reduction=reduction,
            softcap=5.0,
            return_lse=True,
            backend=backend,
        )
        return (3.0 * loss).sum() + lse.sum()  # a factor, so that the backward has to multiply

    torch._dynamo.reset()
    eager, compiled = (
        function(*leaves, target) for function in (step, torch.compile(step, fullgraph=True, backend=compiler))
    )
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled, leaves), torch.autograd.grad(eager, leaves), strict=True):
        torch.testing.assert_close(a, b)


@only_native
def test_trap_more_logits_than_2_to_the_31(backend):
    """70,000 rows of 32,768 classes: 2.3e9 logits, in chunks. Rows on both sides against float64."""
    rows, vocab = 70_000, 32_768
    g = seeded(8)
    hidden, weight = (
        torch.randn(rows, 1, generator=g).to(DEVICE).bfloat16(),
        torch.randn(vocab, 1, generator=g).to(DEVICE).bfloat16(),
    )
    target = torch.randint(0, vocab, (rows,), generator=g).to(DEVICE)
    loss = linear_cross_entropy(hidden, weight, target, reduction="none", backend=backend)
    checked = [0, 1, 65535, 65536, 65537, rows - 1]
    truth = formula(hidden[checked].double(), weight.double(), target[checked], reduction="none")
    torch.testing.assert_close(loss[checked].double(), truth, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_no_host_sync(backend):
    hidden, weight, target = small(dtype=torch.bfloat16)
    target[2] = -100
    step = lambda: (
        2.0 * linear_cross_entropy(hidden, weight, target, backend=backend, chunk_bytes=2 * 11 * 2)
    ).backward()
    step()  # compile the kernels first
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_trap_cuda_graph_capture(backend):
    hidden, weight, target = small(dtype=torch.bfloat16)

    def step():
        loss = 2.0 * linear_cross_entropy(hidden, weight, target, backend=backend, chunk_bytes=2 * 11 * 2)
        return torch.autograd.grad(loss, (hidden, weight))

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.normal_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
