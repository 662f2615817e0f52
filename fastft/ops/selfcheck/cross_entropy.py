"""cross_entropy: loss, gradient and losses per row, with class weights, label smoothing and an ignored target."""

import torch
import torch.nn.functional as F

from fastft.ops import cross_entropy
from fastft.ops.selfcheck import relative


def check(backend: str, device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(9, 1003, generator=generator)).to(device, dtype)
    target = torch.randint(0, 1003, (9,), generator=generator).to(device)
    target[4] = -100
    weight = (torch.rand(1003, generator=generator) + 0.5).to(device)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = cross_entropy(ours, target, weight=weight, label_smoothing=0.1, backend=backend)
    true_loss = F.cross_entropy(truth, target, weight=weight.double(), label_smoothing=0.1)
    loss.backward()
    true_loss.backward()
    rows = cross_entropy(logits, target, reduction="none", backend=backend)
    true_rows = F.cross_entropy(logits.double(), target, reduction="none")
    return relative([(loss.detach(), true_loss.detach()), (ours.grad, truth.grad), (rows, true_rows)])
