"""What linear_cross_entropy adds up over its chunks: the gradients of weights, and products in two pieces.

Sums are taken in float32 and rounded once. In bfloat16 every chunk after the first would round the whole sum again, and
small late terms would vanish in it.
"""

import torch
from torch import Tensor

from fastft.ops.linear_cross_entropy_plan import block_of_classes

SLAB_BYTES = 4 << 20  # of a piece of dW on the CPU: stays in the L2/L3 cache between its GEMM and its addition


def wide(dtype: torch.dtype) -> torch.dtype:
    """In which sums of this dtype are taken."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H100's where there is none, for tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a b, or total = a b for the first; total in the dtype of a and b, or in float32."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=0 if first else 1, out=total)
    else:  # torch's CPU GEMM cannot write float32 from bfloat16
        product = torch.mm(a.to(total.dtype), b.to(total.dtype))
        total.copy_(product) if first else total.add_(product)


def sum_of_products(out: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> None:
    """out = the sum of a b over the pairs, rounded once."""
    if len(pairs) == 1:
        torch.mm(*pairs[0], out=out)
        return
    total = out if out.dtype == wide(out.dtype) else torch.empty_like(out, dtype=wide(out.dtype))
    for i, (a, b) in enumerate(pairs):
        add_product(total, a, b, first=i == 0)
    if total is not out:
        out.copy_(total)


class Sum:
    """grad^T x summed over chunks, (V, H).

    One chunk needs no wide sum: the GEMM itself adds up in float32. like: (V, H); rows: V, or more where the logits
    have columns of padding, which are not returned.
    """

    def __init__(self, like: Tensor, rows: int, chunks: int):
        self.like = like
        self.wide = chunks > 1 and like.dtype != wide(like.dtype)
        make = torch.zeros if chunks == 0 else torch.empty
        dtype = wide(like.dtype) if self.wide else like.dtype
        self.total = make((rows, like.shape[1]), dtype=dtype, device=like.device)
        self.first = True

    def add(self, grad: Tensor, x: Tensor) -> None:
        """grad: (n, rows), x: (n, H)."""
        if self.wide and grad.device.type == "cpu":
            self._add_slabs(grad, x)
        else:
            add_product(self.total, grad.t(), x, self.first)
        self.first = False

    def _add_slabs(self, grad: Tensor, x: Tensor) -> None:
        """A slab at a time, so that its product is still in the cache when it is added: total.add_(product) over the
        whole, mixing dtypes, is not vectorised (768 x 50257: 150 ms, slabs 25).
        """
        height = max(SLAB_BYTES // (x.shape[1] * self.total.element_size()), 1)
        product = x.new_empty(min(height, self.total.shape[0]), x.shape[1])
        widened = torch.empty_like(product, dtype=self.total.dtype)
        for start in range(0, self.total.shape[0], height):
            total = self.total[start : start + height]
            p = torch.mm(grad[:, start : start + height].t(), x, out=product[: total.shape[0]])
            if self.first:
                total.copy_(p)
            else:
                total.add_(widened[: total.shape[0]].copy_(p))

    def finish(self) -> Tensor:
        """The gradient, (V, H) in like's dtype."""
        total = self.total[: self.like.shape[0]]
        del self.total  # or it would stay in memory with its narrower copy
        return total.to(self.like.dtype)


class Parked:
    """grad^T x over all rows without a float32 sum of the size of dW, (V, H).

    dW has room for the logits' gradient of H rows, as many as it has columns, and nothing is in it before the end. So
    the first chunks' gradients wait there, a block of classes at a time; when the last chunk is there too, each block
    of dW is summed over all rows in float32, and rounded into the place of the gradients that made it. For 8192 x 4096
    x 128256 that is 1.0 GiB less than all logits at once, for one more pass over half of them.
    """

    def __init__(self, like: Tensor, rows: int, parked: int, count: int):
        """like: (V, H); rows: V or more, see Sum; parked: rows of hidden states that wait, at most H, of count."""
        assert parked <= like.shape[1], "more rows than dW has room for"
        self.like, self.parked, self.done = like, parked, 0
        self.total = like.new_empty(rows, like.shape[1])
        self.x = like.new_empty(count, like.shape[1])
        step = block_of_classes(like.shape[1], multiprocessors(like.device))
        self.blocks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def add(self, grad: Tensor, x: Tensor) -> None:
        """grad: (n, rows), x: (n, H). The chunk after the parked rows is the last."""
        rows = slice(self.done, self.done + x.shape[0])
        self.x[rows] = x
        self.done = rows.stop
        if rows.stop <= self.parked:
            for block in self.blocks:
                _copy_words(self._waiting(block)[rows], grad[:, block])
        else:
            assert rows == slice(self.parked, self.x.shape[0]), "one chunk follows the parked rows"
            self._sum(grad)

    def _waiting(self, block: slice) -> Tensor:
        """(parked, classes of the block), contiguous."""
        memory, classes = self.total[block].view(-1), block.stop - block.start
        return memory[: self.parked * classes].view(self.parked, classes)

    def _sum(self, grad: Tensor) -> None:
        width = self.blocks[0].stop
        sums = self.total.new_empty(width, self.total.shape[1], dtype=wide(self.total.dtype))
        for block in self.blocks:
            part = sums[: block.stop - block.start]
            add_product(part, self._waiting(block).t(), self.x[: self.parked], first=True)
            add_product(part, grad[:, block].t(), self.x[self.parked :], first=False)
            self.total[block].copy_(part)

    def finish(self) -> Tensor:
        """The gradient, (V, H) in like's dtype."""
        assert self.done == self.x.shape[0], "chunks are missing"
        return self.total[: self.like.shape[0]]


def _copy_words(out: Tensor, rows: Tensor) -> None:
    """out = rows, eight bytes at a time where rows are so long: torch copies strided rows element by element."""
    words = 8 // rows.element_size()
    if rows.shape[1] % words == 0 and rows.stride(0) % words == 0 and rows.storage_offset() % words == 0:
        out, rows = out.view(torch.int64), rows.view(torch.int64)
    out.copy_(rows)
