"""cross_entropy against float64, over backend x dtype x options x shape.

The traps are in test_cross_entropy_traps.py.
"""

import pytest
import torch
import torch.nn.functional as F

from fastft.ops import cross_entropy
from fastft.ops import cross_entropy_autograd as autograd
from fastft.ops import cross_entropy_common as common
from tests.ops.common import BACKENDS, DEVICE, assert_as_good_as, assert_rounded_once, rounded, seeded

pytestmark = pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton.runtime.interpreter"
)  # numpy on ignored rows' -inf

DTYPES = [torch.float32, torch.bfloat16]

OPTIONS = {
    "plain": {},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "weight_smoothing": {"weight": True, "label_smoothing": 0.3},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "logit_scale": {"logit_scale": -0.7},
    "token_weight": {"token_weight": "rows"},
    "scalar_token_weight": {"token_weight": "scalar"},
    "ignore_index_is_a_class": {"ignore_index": 0},
    "all": {
        "weight": True,
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "softcap": 2.0,
        "logit_scale": 1.3,
        "token_weight": "rows",
        "ignore_index": 2,
    },
}
SHAPES = {
    (29, 507): tuple(OPTIONS),
    (1, 1000): ("plain", "all"),
    (6, 1): ("plain", "z_loss"),  # with smoothing the only gradient is rounding noise
    (3, 32001): ("plain", "all"),  # more than one block
    (2, 8192): ("plain", "all"),  # exactly one block
}
CASES = [(shape, name) for shape in SHAPES for name in SHAPES[shape]]


def formula(
    logits,
    target,
    *,
    weight=None,
    ignore_index=-100,
    label_smoothing=0.0,
    z_loss=0.0,
    softcap=None,
    logit_scale=1.0,
    token_weight=None,
    reduction="mean",
):
    """The definition, through torch's cross-entropy; float64 logits give the truth, float32 logits torch's error."""
    x = logits * logit_scale
    x = x if softcap is None else softcap * torch.tanh(x / softcap)
    valid = target != ignore_index
    weight = None if weight is None else weight.to(x.dtype)
    loss = F.cross_entropy(
        x, target, weight=weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
    loss = loss + z_loss * torch.where(valid, torch.logsumexp(x, -1) ** 2, 0.0)
    count = valid.to(x.dtype) if weight is None else torch.where(valid, weight[target.clamp(0)], 0.0)
    if token_weight is not None:
        loss, count = loss * token_weight.to(x.dtype), count * token_weight.to(x.dtype)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / count.sum()}[reduction]


def make(shape, name, dtype, device=DEVICE):
    """(logits, target, options) with a quarter of the targets ignored."""
    rows, vocab = shape
    options = dict(OPTIONS[name])
    g = seeded(rows, vocab, list(OPTIONS).index(name), DTYPES.index(dtype))
    logits = (3 * torch.randn(shape, generator=g)).to(dtype).to(device)
    target = torch.randint(0, vocab, (rows,), generator=g)
    if rows > 1:
        target[torch.randperm(rows, generator=g)[: max(rows // 4, 1)]] = options.get("ignore_index", -100)
    if options.get("weight"):
        options["weight"] = (torch.rand(vocab, generator=g) + 0.1).to(device)
    if "token_weight" in options:
        size = (rows,) if options["token_weight"] == "rows" else ()
        options["token_weight"] = (torch.rand(size, generator=g) + 0.1).to(device)
    if vocab == 1 and options.get("ignore_index") == 2:
        options["ignore_index"] = -1
        target[target == 2] = -1
    return logits, target.to(device), options


def loss_and_gradient(function, logits, target, upstream, **options):
    logits = logits.detach().requires_grad_()
    loss = function(logits, target, **options)
    (grad,) = torch.autograd.grad(loss, logits, upstream if loss.ndim else None)
    return loss.detach(), grad


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("shape", "name"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_matches_float64(backend, dtype, shape, name, reduction):
    logits, target, options = make(shape, name, dtype)
    options["reduction"] = reduction
    upstream = torch.rand(shape[0], generator=seeded(*shape)).to(DEVICE)
    true_loss, true_grad = loss_and_gradient(formula, logits.double(), target, upstream.double(), **options)
    base_loss, base_grad = loss_and_gradient(formula, logits.float(), target, upstream, **options)
    loss, grad = loss_and_gradient(cross_entropy, logits, target, upstream, backend=backend, **options)
    assert_as_good_as(loss, base_loss, true_loss, "loss", terms=0.1)
    # 1 - tanh^2 cancels, and so does p - 1 with a single class: float32's error there is up to 8 times as large in the
    # gradient.
    terms = 8 * true_grad.abs().max().item() if "softcap" in options or shape[1] == 1 else 0.0
    assert_as_good_as(grad, rounded(base_grad, dtype, backend), true_grad, "gradient", terms=terms)
    assert_rounded_once(grad, true_grad, "gradient", backend, terms=terms)


@pytest.mark.parametrize("name", ["plain", "weight", "smoothing", "weight_smoothing", "ignore_index_is_a_class"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_is_torchs_where_both_are_defined(name, reduction):
    logits, target, options = make((29, 507), name, torch.float32, "cpu")
    ours = cross_entropy(logits.double(), target, reduction=reduction, **options)
    if "weight" in options:
        options["weight"] = options["weight"].double()
    torch.testing.assert_close(ours, F.cross_entropy(logits.double(), target, reduction=reduction, **options))


@pytest.mark.parametrize("name", OPTIONS)
def test_reference_gradcheck(name):
    logits, target, options = make((5, 7), name, torch.float32, "cpu")
    logits = logits.double().requires_grad_()
    for reduction in ("mean", "none"):
        assert torch.autograd.gradcheck(
            lambda x, r=reduction: cross_entropy(x, target, reduction=r, backend="reference", **options), logits
        )
    assert torch.autograd.gradgradcheck(lambda x: cross_entropy(x, target, backend="reference", **options), logits)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_in_place_gives_the_same_bits(backend, name):
    logits, target, options = make((29, 507), name, torch.bfloat16)
    for reduction in ("mean", "sum"):
        loss, grad = loss_and_gradient(
            cross_entropy, logits, target, None, backend=backend, reduction=reduction, **options
        )
        leaf = logits.clone().requires_grad_()
        scratch = leaf * 1
        in_place = cross_entropy(scratch, target, backend=backend, reduction=reduction, inplace=True, **options)
        (in_place_grad,) = torch.autograd.grad(in_place, leaf)
        # The reference's closed form and torch's autograd round differently.
        tolerance = {"rtol": 1.6e-2, "atol": 1e-5} if backend == "reference" else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(in_place.detach(), loss, rtol=1e-6 if backend == "reference" else 0, atol=0)
        torch.testing.assert_close(in_place_grad, grad, **tolerance)
        torch.testing.assert_close(scratch.detach(), in_place_grad, rtol=0, atol=0)  # the storage is the gradient


@pytest.mark.parametrize("backend", BACKENDS)
def test_leading_dimensions_and_lse(backend):
    g = seeded(1)
    logits = torch.randn(2, 3, 11, generator=g).to(DEVICE).requires_grad_()
    target = torch.randint(0, 11, (2, 3), generator=g).to(DEVICE)
    loss, lse = cross_entropy(logits, target, reduction="none", return_lse=True, softcap=2.0, backend=backend)
    assert loss.shape == lse.shape == (2, 3) and loss.dtype == lse.dtype == torch.float32
    assert not lse.requires_grad
    torch.testing.assert_close(lse, torch.logsumexp(2.0 * torch.tanh(logits / 2.0), -1).detach())
    mean, lse_again = cross_entropy(logits, target, return_lse=True, softcap=2.0, backend=backend)
    assert mean.ndim == 0 and not lse_again.requires_grad
    # Not the same bits: on a GPU the kernel that computes the gradient too adds up in another order.
    torch.testing.assert_close(lse_again, lse, rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(mean, loss.mean())


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend):
    logits = torch.randn(0, 11, device=DEVICE, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=DEVICE)
    for reduction, shape in (("mean", ()), ("sum", ()), ("none", (0,))):
        loss = cross_entropy(logits, target, reduction=reduction, backend=backend)
        assert loss.shape == shape and loss.sum() == 0
        assert torch.autograd.grad(loss.sum(), logits)[0].shape == (0, 11)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_take_the_reference(dtype):
    logits, target, _ = make((29, 507), "plain", torch.float32)
    loss = cross_entropy(logits.to(dtype), target)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss, formula(logits.to(dtype).to(loss.dtype), target))


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up_to_the_global_batch(backend):
    """How the training loop normalises: reduction="sum", token_weight = 1 / valid tokens of the whole batch."""
    logits, target, _ = make((29, 507), "plain", torch.bfloat16)
    _, whole = loss_and_gradient(cross_entropy, logits, target, None, backend=backend)
    valid = (target != -100).sum()
    parts = [
        loss_and_gradient(
            cross_entropy, logits[rows], target[rows], None, reduction="sum", token_weight=1.0 / valid, backend=backend
        )
        for rows in (slice(0, 4), slice(4, 21), slice(21, 29))
    ]
    torch.testing.assert_close(sum(loss for loss, _ in parts), cross_entropy(logits, target, backend=backend))
    torch.testing.assert_close(torch.cat([grad for _, grad in parts]), whole)


L, T = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64)
WRONG = {
    "torch_layout": (torch.zeros(2, 5, 3), torch.zeros(2, 3, dtype=torch.int64), {}, "move the class dimension"),
    "target_shape": (L, T[:3], {}, "logits must be"),
    "target_dtype": (L, T.int(), {}, "must be int64"),
    "target_probabilities": (L, L, {}, "class probabilities"),
    "integer_logits": (L.long(), T, {}, "must be floating"),
    "no_classes": (L[:, :0], T, {}, "no classes"),
    "weight_shape": (L, T, {"weight": torch.ones(4)}, "weight must be"),
    "weight_grad": (L, T, {"weight": torch.ones(5, requires_grad=True)}, "requires grad"),
    "token_weight_shape": (L, T, {"token_weight": torch.ones(5)}, "token_weight must be"),
    "other_device": (L, T, {"token_weight": torch.ones(4, device="meta")}, "is on meta"),
    "smoothing": (L, T, {"label_smoothing": 1.1}, "label_smoothing"),
    "reduction": (L, T, {"reduction": "average"}, "known: mean, sum, none"),
    "softcap": (L, T, {"softcap": 0.0}, "softcap"),
    "inplace_none": (L, T, {"inplace": True, "reduction": "none"}, "inplace"),
    "inplace_leaf": (L.clone().requires_grad_(), T, {"inplace": True}, "leaf"),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    logits, target, options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, target, **options)


@pytest.mark.parametrize("name", ["plain", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, name):
    logits, target, options = make((7, 33), name, torch.float32)
    tensors = (options.get("weight"), options.get("token_weight"))
    numbers = (options.get("ignore_index", -100), options.get("label_smoothing", 0.0), options.get("z_loss", 0.0),
               options.get("softcap", 0.0), options.get("logit_scale", 1.0))  # fmt: skip
    leaf = logits.clone().requires_grad_()
    scale = torch.tensor(0.2, device=DEVICE)
    torch.library.opcheck(autograd.reduced_op, (leaf, target, *tensors, scale, *numbers, True, True, backend))
    torch.library.opcheck(autograd.rows_op, (leaf, target, *tensors, *numbers, True, backend))
    rows = torch.rand(7, device=DEVICE)
    torch.library.opcheck(autograd._rows_grad_op, (logits, target, *tensors, rows, *numbers, backend))
    torch.library.opcheck(autograd._in_place_op, (logits.clone(), target, *tensors, scale, *numbers, True, backend))
    torch.library.opcheck(common.bad_row_op, (target, numbers[0], 33))
