"""cross_entropy on drawn shapes, strides and flags, against the reference in float64."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastft.ops import cross_entropy
from tests.ops.common import DEVICE, NATIVE_BUILT, assert_as_good_as, seeded

BACKEND = "native" if NATIVE_BUILT else "reference"


@st.composite
def cases(draw):
    rows, vocab, seed = draw(st.integers(0, 9)), draw(st.integers(1, 300)), draw(st.integers(0, 2**32))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    generator = seeded(seed)
    layout = draw(st.sampled_from(["plain", "offset", "padded", "transposed", "every_other"]))
    wide = 3 * torch.randn(rows + 2, 2 * vocab + 3, generator=generator)
    views = {
        "plain": lambda x: x[:rows, :vocab].clone(),
        "offset": lambda x: x[1 : rows + 1, 1 : vocab + 1],
        "padded": lambda x: x[:rows, :vocab],
        "transposed": lambda x: x[:rows, :vocab].t().contiguous().t(),
        "every_other": lambda x: x[:rows, : 2 * vocab : 2],
    }
    logits = views[layout](wide.to(DEVICE, dtype))
    target = torch.randint(vocab, (rows,), generator=generator).to(DEVICE)
    ignored = torch.rand(rows, generator=generator).to(DEVICE) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    target[ignored] = -100
    options = {
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "z_loss": draw(st.sampled_from([0.0, 1e-2])),
        "softcap": draw(st.sampled_from([None, 4.0])),
        "logit_scale": draw(st.sampled_from([1.0, 0.5, -1.0])),
    }
    if draw(st.booleans()):
        options["weight"] = torch.rand(vocab, generator=generator).to(DEVICE) + 0.5
    if draw(st.booleans()):
        shape = draw(st.sampled_from([(), (rows,)]))
        options["token_weight"] = torch.rand(shape, generator=generator).to(DEVICE) + 0.5
    inplace = options["reduction"] != "none" and draw(st.booleans())
    return logits, target, options, inplace


def loss_and_gradient(logits, target, options, dtype, **how):
    leaf = logits.detach().to(dtype).requires_grad_()
    options = {k: v.to(dtype) if torch.is_tensor(v) and dtype == torch.float64 else v for k, v in options.items()}
    loss = cross_entropy(leaf * 1 if how.get("inplace") else leaf, target, **options, **how)
    loss.sum().backward()
    return loss.detach(), leaf.grad


@settings(max_examples=150, deadline=None)
@given(cases())
def test_property_any_shape_stride_and_option(case):
    logits, target, options, inplace = case
    before = logits.clone()
    ours = loss_and_gradient(logits, target, options, logits.dtype, backend=BACKEND, inplace=inplace)
    peer = loss_and_gradient(logits, target, options, logits.dtype, backend="reference")
    truth = loss_and_gradient(logits, target, options, torch.float64, backend="reference")
    assert torch.equal(logits, before)
    if not target.numel():
        return
    scale = truth[0].abs().max().item() + 20.0  # terms of the loss that may cancel
    assert_as_good_as(ours[0], peer[0], truth[0], "loss", terms=scale)
    assert_as_good_as(ours[1], peer[1], truth[1], "gradient", terms=4.0)
    assert (ours[1][target == -100] == 0).all()
