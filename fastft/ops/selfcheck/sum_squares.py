"""sum_squares: tensors of one element, of less than a block and of several blocks."""

import torch

from fastft.ops import sum_squares
from fastft.ops.selfcheck import relative


def check(backend: str, device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(n, generator=generator).to(device, dtype) for n in (1, 1003, 70001)]
    truth = torch.stack([t.double().square().sum() for t in tensors]).sum()
    return relative([(sum_squares(tensors, backend=backend), truth)])
