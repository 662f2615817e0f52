"""scale: the product with a 0-dim factor that cross_entropy's backward needs, into new memory and in place."""

import torch

from fastft.ops import backends
from fastft.ops.selfcheck import relative


def check(backend: str, device: str, dtype: torch.dtype) -> float:
    grad = torch.randn(5, 1003, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    factor = torch.tensor(0.3, device=device)
    truth = grad.double() * factor.double()
    apart, in_place = torch.empty_like(grad), grad.clone()
    backends.implementation("scale", backend)(grad, factor, apart)
    backends.implementation("scale", backend)(in_place, factor, in_place)
    return relative([(apart, truth), (in_place, truth)])
