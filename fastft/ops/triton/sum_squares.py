"""Sum of squares in Triton: a partial sum per block of each tensor, added up by torch in a fixed order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
PER_PROGRAM = 16 * BLOCK


@triton.jit
def _partial_sums(x_ptr, out_ptr, n, BLOCK: tl.constexpr, PER_PROGRAM: tl.constexpr):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, PER_PROGRAM, BLOCK):
        at = program * PER_PROGRAM + start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < n, other=0.0).to(tl.float64)
        total += x * x
    tl.store(out_ptr + program, tl.sum(total, axis=0))


def sum_squares(tensors: list[Tensor], out: Tensor) -> None:
    """The interface of a kernel: contiguous tensors of one dtype; writes into out, () float64."""
    programs = [triton.cdiv(t.numel(), PER_PROGRAM) for t in tensors]
    partial = torch.empty(sum(programs), dtype=torch.float64, device=out.device)
    for tensor, count, part in zip(tensors, programs, partial.split(programs), strict=True):
        if count:
            _partial_sums[(count,)](tensor, part, tensor.numel(), BLOCK=BLOCK, PER_PROGRAM=PER_PROGRAM)
    out.copy_(partial.sum())
