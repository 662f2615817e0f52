"""linear_cross_entropy against float64, over backend x dtype x options x reduction.

The traps are in test_linear_cross_entropy_traps.py.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.ops import cross_entropy, linear_cross_entropy
from tests.ops.common import BACKENDS, DEVICE, NATIVE, NATIVE_BUILT, TRITON, assert_as_good_as, seeded
from tests.ops.test_cross_entropy import formula as of_logits

module = sys.modules["fastft.ops.linear_cross_entropy"]  # the package's attribute of that name is the function

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton.runtime.interpreter"
)  # numpy on ignored rows' -inf

DTYPES = [torch.float32, torch.bfloat16]
UNIT = 2.5e-7  # of assert_as_good_as
NAMES = ("hidden", "weight", "bias", "hidden2", "weight2")

OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "low_rank": {"rank": 3},
    "class_weight": {"class_weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": -0.7},
    "token_weight": {"token_weight": "rows"},
    "scalar_token_weight": {"token_weight": "scalar"},
    "ignore_index_is_a_class": {"ignore_index": 0},
    "all": {
        "bias": True,
        "rank": 5,
        "class_weight": True,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 2.0,
        "logit_scale": 1.3,
        "token_weight": "rows",
        "ignore_index": 2,
    },
}


def make(shape, name, dtype, *seeds):
    """(tensors by name: parameters and hidden states, target, options) with a quarter of the targets ignored."""
    rows, width, vocab = shape
    options = dict(OPTIONS[name])
    g = seeded(rows, width, vocab, list(OPTIONS).index(name), DTYPES.index(dtype), *seeds)
    rank = options.pop("rank", 0)
    shapes = {"hidden": (rows, width), "weight": (vocab, width)}
    shapes |= {"bias": (vocab,)} if options.pop("bias", False) else {}
    shapes |= {"hidden2": (rows, rank), "weight2": (vocab, rank)} if rank else {}
    scales = {"hidden": 1.0, "weight": 3 / width**0.5, "bias": 1.0, "hidden2": 0.5, "weight2": 1.0}
    tensors = {key: (scales[key] * torch.randn(s, generator=g)).to(dtype).to(DEVICE) for key, s in shapes.items()}
    target = torch.randint(0, vocab, (rows,), generator=g)
    target[torch.randperm(rows, generator=g)[: rows // 4]] = options.get("ignore_index", -100)
    if options.get("class_weight"):
        options["class_weight"] = (torch.rand(vocab, generator=g) + 0.1).to(DEVICE)
    if "token_weight" in options:
        size = (rows,) if options["token_weight"] == "rows" else ()
        options["token_weight"] = (torch.rand(size, generator=g) + 0.1).to(DEVICE)
    return tensors, target.to(DEVICE), options


def formula(hidden, weight, target, *, bias=None, low_rank=None, class_weight=None, **options):
    """The definition: all logits, through torch's own linear and cross-entropy in the tensors' dtype."""
    logits = F.linear(hidden, weight, bias)
    if low_rank is not None:
        logits = logits + F.linear(*low_rank)
    return of_logits(logits, target, weight=class_weight, **options)


def loss_and_gradients(function, tensors, target, upstream=None, **options):
    """(loss, gradients by name)"""
    leaves = {key: t.detach().requires_grad_() for key, t in tensors.items()}
    low_rank = (leaves["hidden2"], leaves["weight2"]) if "hidden2" in leaves else None
    loss = function(leaves["hidden"], leaves["weight"], target, bias=leaves.get("bias"), low_rank=low_rank, **options)
    grads = torch.autograd.grad(loss, list(leaves.values()), upstream.to(loss.dtype) if loss.ndim else None)
    return loss.detach(), dict(zip(leaves, grads, strict=True))


def in_dtype(tensors, dtype):
    return {key: t.to(dtype) for key, t in tensors.items()}


def assert_matches(tensors, target, upstream, options, slack=0.0, **ours):
    """Loss and every gradient: at most twice the error of torch's plain path in the same dtype.

    slack: errors of this share of the truth, and of so much in each row's loss, pass anyway (torch's own may happen to
    be none).
    """
    truth = loss_and_gradients(formula, in_dtype(tensors, torch.float64), target, upstream.double(), **options)
    plain = loss_and_gradients(formula, tensors, target, upstream, **options)
    got = loss_and_gradients(linear_cross_entropy, tensors, target, upstream, **options, **ours)
    rows = target.numel() if options.get("reduction") == "sum" else 1
    assert_as_good_as(got[0], plain[0].float(), truth[0], "loss", terms=1.0 + slack * rows / UNIT)
    for name, grad in got[1].items():
        size = truth[1][name].abs().max().item()
        # float32 sums in another order: a few units of the largest term. Triton's interpreter truncates to bfloat16,
        # which is biased. bfloat16: which of the two roundings of a largest element is luckier is a matter of chance.
        noise = (8 if grad.dtype == torch.float32 else 0.003 / UNIT) * size
        if grad.dtype == torch.bfloat16 and ours.get("backend") == "triton" and DEVICE == "cpu":
            noise = 0.01 / UNIT * size
        assert_as_good_as(grad, plain[1][name], truth[1][name], name, terms=noise + slack * size / UNIT)
    return got


# Triton's kernels meet all options in test_cross_entropy.py already, at a second per call in the interpreter.
CASES = [(b, n) for b in (NATIVE, "reference") for n in OPTIONS] + [(TRITON, n) for n in ("plain", "all")]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("backend", "name"),
    [pytest.param(*(b.values if b != "reference" else [b]), n, marks=getattr(b, "marks", ())) for b, n in CASES],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_float64(backend, dtype, name, reduction):
    shape = (31, 37, 507)
    tensors, target, options = make(shape, name, dtype)
    upstream = torch.rand(shape[0], generator=seeded(*shape)).to(DEVICE)
    assert_matches(
        tensors,
        target,
        upstream,
        {**options, "reduction": reduction},
        backend=backend,
        chunk_bytes=9 * 507 * dtype.itemsize,
    )


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 1000), (5, 1, 3), (123, 252, 1), (64, 16, 4099), (33, 123, 507)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_shapes(dtype, shape):
    tensors, target, options = make(shape, "plain", dtype)
    assert_matches(tensors, target, torch.ones(shape[0], device=DEVICE), options)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_shape_stride_and_flag(data):
    """Whatever the shape, the strides, the options, the chunk size and the set of wanted gradients."""
    draw = data.draw
    rows, width, vocab = (
        draw(st.integers(1, most), label=what) for what, most in (("rows", 70), ("width", 40), ("vocab", 300))
    )
    name, dtype = draw(st.sampled_from(list(OPTIONS))), draw(st.sampled_from(DTYPES))
    tensors, target, options = make(
        (rows, width, max(vocab, 4)), name, dtype, draw(st.integers(0, 10**6), label="seed")
    )
    ignored = draw(st.sampled_from([0.0, 0.5, 0.9]), label="ignored")
    target[torch.rand(rows, generator=seeded(rows, width)) < ignored] = options.get("ignore_index", -100)
    if (target == options.get("ignore_index", -100)).all():
        target[0] = 3
    options["reduction"] = draw(st.sampled_from(["mean", "sum", "none"]))
    for key in tensors:
        if draw(st.booleans(), label=f"{key} strided"):
            tensors[key] = torch.stack([tensors[key]] * 2, -1)[..., 0]
    got = assert_matches(
        tensors,
        target,
        torch.rand(rows, generator=seeded(rows)).to(DEVICE),
        options,
        slack=30 * torch.finfo(dtype).eps,
        chunk_bytes=draw(st.none() | st.integers(1, 20 * 300)),
    )
    wanted = {key for key in tensors if draw(st.booleans(), label=f"{key} wants a gradient")}
    leaves = {key: t.detach().requires_grad_(key in wanted) for key, t in tensors.items()}
    low_rank = (leaves["hidden2"], leaves["weight2"]) if "hidden2" in leaves else None
    loss = linear_cross_entropy(
        leaves["hidden"], leaves["weight"], target, bias=leaves.get("bias"), low_rank=low_rank, **options
    )
    assert loss.requires_grad == bool(wanted)
    if wanted:
        loss.sum().backward()
    assert {key for key, t in leaves.items() if t.grad is not None} == wanted
    torch.testing.assert_close(loss.detach(), got[0], rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("mode", ["reference", "chunked"])
@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch 2.13 brought linear_cross_entropy")
def test_is_torchs_where_both_are_defined(mode, reduction):
    options = torch.nn.LinearCrossEntropyOptions() if mode == "chunked" else None
    tensors, target, own = make((61, 37, 507), "class_weight", torch.float32)
    ours = linear_cross_entropy(tensors["hidden"], tensors["weight"], target, reduction=reduction, **own)
    other = F.linear_cross_entropy(
        tensors["hidden"], tensors["weight"], target, weight=own["class_weight"], reduction=reduction, options=options
    )
    torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gradcheck(name):
    tensors, target, options = make((5, 4, 7), name, torch.float32)
    leaves = [t.double().requires_grad_() for t in tensors.values()]

    def run(*values, **more):
        given = dict(zip(tensors, values, strict=True))
        low_rank = (given["hidden2"], given["weight2"]) if "hidden2" in given else None
        return linear_cross_entropy(given["hidden"], given["weight"], target, bias=given.get("bias"), low_rank=low_rank,
                                    backend="reference", **options, **more)  # fmt: skip

    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(lambda *v, r=reduction: run(*v, reduction=r), leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_and_lse(backend):
    g = seeded(1)
    hidden, weight = (
        torch.randn(2, 3, 7, generator=g).to(DEVICE).requires_grad_(),
        torch.randn(11, 7, generator=g).to(DEVICE),
    )
    target = torch.randint(0, 11, (2, 3), generator=g).to(DEVICE)
    target[0, 1] = -100
    truth = torch.logsumexp(2.0 * torch.tanh(F.linear(hidden, weight) / 2.0), -1).detach()
    for reduction in ("none", "mean"):
        loss, lse = linear_cross_entropy(
            hidden, weight, target, reduction=reduction, return_lse=True, softcap=2.0, backend=backend
        )
        assert loss.shape == (target.shape if reduction == "none" else ()) and loss.dtype == lse.dtype == torch.float32
        assert not lse.requires_grad
        torch.testing.assert_close(lse, truth)  # of the ignored row too
        plain = cross_entropy(F.linear(hidden, weight), target, reduction=reduction, softcap=2.0, backend=backend)
        torch.testing.assert_close(loss, plain)
    one = linear_cross_entropy(hidden[0, 0], weight, target[0, 0], backend=backend)
    torch.testing.assert_close(one, F.cross_entropy(F.linear(hidden[0, 0], weight), target[0, 0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    hidden, weight = (
        torch.randn(0, 7, device=DEVICE, requires_grad=True),
        torch.randn(11, 7, device=DEVICE, requires_grad=True),
    )
    target = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        loss = linear_cross_entropy(hidden, weight, target, reduction=reduction, backend=backend)
        assert loss.shape == shape and loss.sum() == 0
        of_hidden, of_weight = torch.autograd.grad(loss.sum(), (hidden, weight))
        assert of_hidden.shape == (0, 7) and of_weight.shape == (11, 7) and (of_weight == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_reference(dtype):
    tensors, target, _ = make((29, 31, 507), "plain", torch.float32)
    loss, grads = loss_and_gradients(linear_cross_entropy, in_dtype(tensors, dtype), target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and grads["weight"].dtype == dtype
    rounded = in_dtype(in_dtype(tensors, dtype), loss.dtype)
    torch.testing.assert_close(loss, formula(rounded["hidden"], rounded["weight"], target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_to_the_global_batch(backend):
    """How the training loop normalises: reduction="sum", token_weight = 1 / valid tokens of the whole batch."""
    tensors, target, _ = make((61, 37, 507), "plain", torch.float32)
    loss, whole = loss_and_gradients(linear_cross_entropy, tensors, target, backend=backend)
    valid = (target != -100).sum()
    parts = []
    for rows in (slice(0, 4), slice(4, 41), slice(41, 61)):
        part = {"hidden": tensors["hidden"][rows], "weight": tensors["weight"]}
        options = {"reduction": "sum", "token_weight": 1.0 / valid, "backend": backend}
        parts.append(loss_and_gradients(linear_cross_entropy, part, target[rows], **options))
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(torch.cat([part[1]["hidden"] for part in parts]), whole["hidden"])
    torch.testing.assert_close(sum(part[1]["weight"] for part in parts), whole["weight"])


H, W, T = torch.zeros(4, 6), torch.zeros(5, 6), torch.zeros(4, dtype=torch.int64)
WRONG = {
    "target_shape": (H, W, T[:3], {}, "hidden must be"),
    "weight_transposed": (H, W.T, T, {}, "weight must be"),
    "weight_empty": (H, W[:0], T, {}, "weight must be"),
    "weight_dtype": (H, W.bfloat16(), T, {}, "weight is torch.bfloat16"),
    "target_dtype": (H, W, T.int(), {}, "must be int64"),
    "integers": (H.long(), W.long(), T, {}, "must be floating"),
    "bias_shape": (H, W, T, {"bias": torch.zeros(4)}, "bias must be"),
    "bias_dtype": (H, W, T, {"bias": torch.zeros(5).double()}, "bias is torch.float64"),
    "low_rank_rows": (H, W, T, {"low_rank": (torch.zeros(3, 2), torch.zeros(5, 2))}, "like hidden"),
    "low_rank_shape": (H, W, T, {"low_rank": (torch.zeros(4, 2), torch.zeros(2, 5))}, r"low_rank\[1\] must be"),
    "class_weight_shape": (H, W, T, {"class_weight": torch.ones(4)}, "class_weight must be"),
    "class_weight_grad": (H, W, T, {"class_weight": torch.ones(5, requires_grad=True)}, "requires grad"),
    "token_weight_shape": (H, W, T, {"token_weight": torch.ones(5)}, "token_weight must be"),
    "other_device": (H, W, T, {"token_weight": torch.ones(4, device="meta")}, "is on meta"),
    "smoothing": (H, W, T, {"label_smoothing": 1.1}, "label_smoothing"),
    "reduction": (H, W, T, {"reduction": "average"}, "known: mean, sum, none"),
    "softcap": (H, W, T, {"softcap": 0.0}, "softcap"),
    "chunk_bytes": (H, W, T, {"chunk_bytes": 0}, "chunk_bytes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    hidden, weight, target, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(hidden, weight, target, **options)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.skipif(not NATIVE_BUILT, reason="fastft._C is not built")
def test_opcheck(name):
    tensors, target, options = make((7, 5, 33), name, torch.float32)
    leaves = [tensors[key].clone().requires_grad_() if key in tensors else None for key in NAMES]
    labels = (target, options.get("class_weight"), options.get("token_weight"))
    numbers = (options.get("ignore_index", -100), options.get("label_smoothing", 0.0), options.get("z_loss", 0.0),
               options.get("softcap", 0.0), options.get("logit_scale", 1.0), 3 * 33 * 4)  # fmt: skip
    scale = torch.tensor(0.2, device=DEVICE)
    needs = [leaf is not None for leaf in leaves]
    torch.library.opcheck(module._reduced_op, (*leaves, *labels, scale, *numbers, True, needs, "native"))
    torch.library.opcheck(module._rows_op, (*leaves, *labels, *numbers, True, "native"))
    plain = [None if leaf is None else leaf.detach() for leaf in leaves]
    upstream = torch.rand(7, device=DEVICE)
    torch.library.opcheck(module._rows_grad_op, (*plain, *labels, upstream, *numbers, needs, "native"))
