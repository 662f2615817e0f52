"""linear_cross_entropy: loss and gradients of hidden, weight and bias over several chunks."""

from typing import Any

import torch
import torch.nn.functional as F

from fastft.ops import linear_cross_entropy
from fastft.ops.selfcheck import relative, worst


def check(backend: str, device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(4)
    tensors = [
        scale * torch.randn(shape, generator=generator)
        for scale, shape in ((1.0, (23, 31)), (0.3, (503, 31)), (1.0, (503,)))
    ]
    ours = [t.to(device, dtype).requires_grad_() for t in tensors]  # hidden, weight, bias
    truth = [t.detach().double().requires_grad_() for t in ours]
    target = torch.randint(0, 503, (23,), generator=generator).to(device)
    target[[4, 11]] = -100
    # Chunks of five rows. Summed, so that the loss is large and its error, which is that of rounded logits, relatively
    # small.
    options: dict[str, Any] = {"label_smoothing": 0.1, "reduction": "sum"}
    hidden, weight, bias = ours
    loss = linear_cross_entropy(
        hidden, weight, target, bias=bias, chunk_bytes=5 * 503 * dtype.itemsize, backend=backend, **options
    )
    true_loss = F.cross_entropy(F.linear(*truth), target, **options)
    pairs = zip(torch.autograd.grad(loss, ours), torch.autograd.grad(true_loss, truth), strict=True)
    errors = [relative([pair]) for pair in pairs]
    loss_error = relative([(loss.detach(), true_loss.detach())])
    # bfloat16 rounds the logits as well as the result, a unit each.
    return worst([loss_error, *(e / (4 if dtype == torch.bfloat16 else 1) for e in errors)])
