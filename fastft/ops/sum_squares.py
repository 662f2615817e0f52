"""Sum of the squares of all elements of a list of tensors, in float64: what a gradient norm reads memory for.

torch.nn.utils.get_total_norm rounds every tensor's norm to the tensor's dtype, and DeepSpeed makes a float64 copy of
every gradient first (18 bytes of traffic per bfloat16 element); this reads each element once (2 bytes).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastft.ops import backends, native, triton
from fastft.ops.transforms import refuse_transforms


def sum_squares(tensors: Iterable[Tensor], *, backend: str | None = None) -> Tensor:
    """Sum of x^2 over every element of every tensor.

    tensors  any shapes and strides, float32 or bfloat16 in any mix (float16, float64: reference backend only), on one
             device. An empty list sums to 0 on the CPU.
    backend  see fastft.ops.backends; None chooses by itself.

    Returns a 0-dim float64 tensor on the tensors' device: inf or nan exactly when an element is (or, for float64 input,
    when the sum overflows). Not differentiable. The same input gives the same bits at any number of threads. Does not
    wait for the device.

    A sparse tensor (COO) counts by its values, duplicates added up.

    Raises ValueError for tensors on several devices, of other layouts, or of dtypes that are not floating.
    """
    tensors = [t.coalesce().values() if t.layout == torch.sparse_coo else t for t in tensors]
    refuse_transforms("sum_squares", *tensors)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout != torch.strided:
            raise ValueError(f"sum_squares takes dense tensors and sparse ones in COO layout, not {tensor.layout}")
        if not tensor.is_floating_point():
            raise ValueError(f"sum_squares takes floating tensors, not {tensor.dtype}")
        if tensor.device != tensors[0].device:
            raise ValueError(f"sum_squares takes tensors of one device, not of {tensors[0].device} and {tensor.device}")
        by_dtype.setdefault(tensor.dtype, []).append(tensor.detach())
    sums = [
        _op(part, backends.select("sum_squares", backend, part[0].device.type, (dtype,)))
        for dtype, part in by_dtype.items()
    ]
    return sum(sums[1:], sums[0]) if sums else torch.zeros((), dtype=torch.float64)


@torch.library.custom_op("fastft::sum_squares", mutates_args=())
def _op(tensors: list[Tensor], backend: str) -> Tensor:
    """One device, one dtype. Hands the backend contiguous tensors."""
    out = torch.empty((), dtype=torch.float64, device=tensors[0].device)
    backends.implementation("sum_squares", backend)([t.contiguous() for t in tensors], out)
    return out


@_op.register_fake
def _fake(tensors, _backend):
    return torch.empty((), dtype=torch.float64, device=tensors[0].device)


def _reference(tensors: list[Tensor], out: Tensor) -> None:
    """The interface of a kernel: writes into out, () float64."""
    total = torch.zeros_like(out)
    for tensor in tensors:
        for part in tensor.reshape(-1).split(1 << 20):  # a float64 copy of a piece at a time
            total += part.double().square().sum()
    out.copy_(total)


backends.register("sum_squares", "native", load=native.loader("sum_squares"), refuses=native.refuses)
backends.register(
    "sum_squares",
    "triton",
    load=triton.loader("sum_squares", "sum_squares"),
    refuses=triton.refuses,
    automatic_on=frozenset({"cuda"}),
)
backends.register("sum_squares", "reference", load=lambda: _reference, refuses=lambda *_: "")
