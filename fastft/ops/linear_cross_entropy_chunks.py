"""The chunk loop of linear_cross_entropy: logits of some rows at a time,
overwritten by their gradient, used up by the GEMMs.

Of three (N, V) x (V, H) GEMMs per row the forward does one and the gradients one each; no logit is computed twice.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastft.ops import backends

# Bytes of logits per chunk. CPU: 1.3k rows of 50k bfloat16 classes; GEMMs gain nothing from more (768 x 50257, 2 cores:
# 134 Gflop/s at 256 rows and at 2048), and each chunk costs one pass over dW. CUDA: 2k-4k rows keep the GEMMs at their
# peak.
CHUNK_BYTES = {"cpu": 128 << 20}
CHUNK_BYTES_ELSEWHERE = 1 << 30
# Of a budget that nobody asked for: with 131 rows (256k classes in 64 MiB) the pass over dW took a fifth of its GEMM.
LEAST_ROWS = 512
SLAB_BYTES = 4 << 20  # of a piece of dW on the CPU: stays in the L2/L3 cache between its GEMM and its addition


def rows_per_chunk(
    rows: int, vocab: int, itemsize: int, device_type: str, chunk_bytes: int | None, sum_bytes: int = 0
) -> int:
    """Rows of each chunk but the last: within the budget, and
    all of about the same size (oneDNN compiles code per size).

    sum_bytes: of the float32 sum that several chunks need for dW and one chunk does not. Where all logits take no more
    than a chunk and that sum (bfloat16: up to some 2 H rows), one chunk is both smaller and faster, and it is taken
    unless chunk_bytes forbids it.
    """
    if chunk_bytes is None:
        budget = CHUNK_BYTES.get(device_type, CHUNK_BYTES_ELSEWHERE)
        most = max(budget // (vocab * itemsize), LEAST_ROWS)
        if rows * vocab * itemsize <= budget + sum_bytes:
            most = max(most, rows)
    else:
        most = max(chunk_bytes // (vocab * itemsize), 1)
    chunks = max(-(-rows // most), 1)
    even = -(-max(rows, 1) // chunks)
    return min(-(-even // 16) * 16, most)


def run(
    kernel: Callable,
    hidden: Tensor,  # (N, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    hidden2: Tensor | None,  # (N, R)
    weight2: Tensor | None,  # (V, R)
    target: Tensor,  # (N,) int64
    class_weight: Tensor | None,  # (V,) float32
    token_weight: Tensor | None,  # (N,) or () float32
    grad_scale: Tensor | None,  # (N,) or () float32
    *,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    logit_scale: float,
    chunk_bytes: int | None,
    loss: Tensor | None,  # (N,) float32 out
    lse: Tensor | None,  # (N,) float32 out
    needs: list[bool],  # gradients wanted of hidden, weight, bias, hidden2, weight2
) -> list[Tensor | None]:
    """Fills loss and lse; returns the gradients of sum_i grad_scale_i * loss_i that are wanted,
    None in the other places.
    """
    vocab = weight.shape[0]
    # Only the CPU leaves ignored rows out: on CUDA their number would have to come to the host, which stalls the
    # stream.
    compact = lse is None and target.device.type == "cpu"
    kept = torch.nonzero(target != ignore_index)[:, 0] if compact else None
    if kept is not None and kept.numel() == target.shape[0]:
        kept = None
    count = target.shape[0] if kept is None else kept.numel()
    sum_bytes = weight.numel() * _wide(weight.dtype).itemsize if needs[1] and weight.dtype != _wide(weight.dtype) else 0
    size = rows_per_chunk(count, vocab, weight.element_size(), weight.device.type, chunk_bytes, sum_bytes)
    grads = _Gradients(hidden, weight, bias, hidden2, weight2, needs, sparse=kept is not None, chunks=-(-count // size))
    if kept is not None and loss is not None:
        loss.zero_()
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    buffer = weight.new_empty(min(size, count), vocab)
    logits: Tensor | None = None
    grad: Tensor | None = None
    # The kernels want one; whoever called has looked.
    bad_row = torch.empty((), dtype=torch.int64, device=target.device)
    for start in range(0, count, size):
        rows = slice(start, min(start + size, count)) if kept is None else kept[start : start + size]
        x, y = _rows(hidden, rows), _rows(target, rows)
        x2, token, scale = (_rows_of(t, rows) for t in (hidden2, token_weight, grad_scale))
        logits = buffer[: y.shape[0]]
        _logits(logits, x, weight, bias, x2, weight2)
        part_loss = None if loss is None else torch.empty_like(loss[: y.shape[0]])
        part_lse = None if lse is None else lse[rows]
        grad = logits if any(needs) else None
        kernel(
            logits, y, class_weight, token, scale, **options, loss=part_loss, lse=part_lse, grad=grad, bad_row=bad_row
        )
        if loss is not None and part_loss is not None:
            loss[rows] = part_loss
        if grad is not None:
            if not compact:  # the gradient of an ignored row is 0, but 0 * inf in the GEMM of dW would be nan
                counts = (y != ignore_index)[:, None]
                x = torch.where(counts, x, 0.0)
                x2 = None if x2 is None else torch.where(counts, x2, 0.0)
            grads.add(grad, x, x2, rows)
    logits = grad = None
    del buffer  # the sums may need as much memory again to become bfloat16
    return grads.finish()


def implementation(backend: str) -> Callable[[], Callable]:
    """For the table: a function that returns `run` around this backend's softmax kernel, or raises ImportError."""

    def load():
        try:
            return functools.partial(run, backends.implementation("cross_entropy", backend))
        except backends.BackendError as error:
            raise (error.__cause__ or error) from None

    return load


def _rows(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def _rows_of(tensor: Tensor | None, rows: slice | Tensor) -> Tensor | None:
    """A chunk's rows; 0-dim tensors and None apply to all rows alike."""
    return tensor if tensor is None or tensor.ndim == 0 else _rows(tensor, rows)


def _logits(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, x2: Tensor | None, weight2: Tensor | None
) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)
    if x2 is not None and weight2 is not None:
        out.addmm_(x2, weight2.t())


class _Gradients:
    """The five gradients, each made only when it is wanted."""

    def __init__(self, hidden, weight, bias, hidden2, weight2, needs: list[bool], sparse: bool, chunks: int):
        make = torch.zeros_like if sparse else torch.empty_like  # sparse: rows that no chunk touches stay 0
        self.weight, self.weight2 = weight, weight2
        self.of_hidden = make(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.of_weight = _Sum(weight, chunks) if needs[1] else None
        self.of_bias = torch.zeros(bias.shape, dtype=_wide(bias.dtype), device=bias.device) if needs[2] else None
        self.of_hidden2 = make(hidden2, memory_format=torch.contiguous_format) if needs[3] else None
        self.of_weight2 = _Sum(weight2, chunks) if needs[4] else None
        self.bias_dtype = None if bias is None else bias.dtype

    def add(self, grad: Tensor, x: Tensor, x2: Tensor | None, rows: slice | Tensor) -> None:
        """grad: (n, V) gradient of this chunk's logits."""
        for out, factor in ((self.of_hidden, self.weight), (self.of_hidden2, self.weight2)):
            if out is None:
                continue
            if isinstance(rows, slice):
                torch.mm(grad, factor, out=out[rows])
            else:
                out.index_copy_(0, rows, torch.mm(grad, factor))
        if self.of_weight is not None:
            self.of_weight.add(grad, x)
        if self.of_weight2 is not None and x2 is not None:
            self.of_weight2.add(grad, x2)
        if self.of_bias is not None:
            self.of_bias += grad.sum(0, dtype=self.of_bias.dtype)

    def finish(self) -> list[Tensor | None]:
        """In the order of `needs`, in the parameters' dtypes."""
        sums = [None if s is None else s.finish() for s in (self.of_weight, self.of_weight2)]
        of_bias = None if self.of_bias is None else self.of_bias.to(self.bias_dtype)
        return [self.of_hidden, sums[0], of_bias, self.of_hidden2, sums[1]]


class _Sum:
    """grad^T x summed over chunks in float32, (V, H).

    In bfloat16 every chunk after the first would round the whole sum again, and small late terms would vanish in it.
    One chunk needs no sum: the GEMM itself adds up in float32.
    """

    def __init__(self, like: Tensor, chunks: int):
        self.like, self.chunks = like, chunks
        self.wide = chunks > 1 and like.dtype != _wide(like.dtype)
        make = torch.zeros if chunks == 0 else torch.empty
        self.total = make(like.shape, dtype=_wide(like.dtype) if self.wide else like.dtype, device=like.device)
        self.first = True

    def add(self, grad: Tensor, x: Tensor) -> None:
        if not self.wide:
            torch.mm(grad.t(), x, out=self.total) if self.first else self.total.addmm_(grad.t(), x)
        elif grad.device.type == "cuda":
            torch.addmm(
                self.total, grad.t(), x, out_dtype=self.total.dtype, beta=0 if self.first else 1, out=self.total
            )
        else:
            self._add_slabs(grad, x)
        self.first = False

    def _add_slabs(self, grad: Tensor, x: Tensor) -> None:
        """torch's CPU GEMM cannot write float32 from bfloat16.

        A slab at a time, so that its product is still in the cache when it is added: total.add_(product) over the
        whole, mixing dtypes, is not vectorised (768 x 50257: 150 ms, slabs 25).
        """
        height = max(SLAB_BYTES // (x.shape[1] * self.total.element_size()), 1)
        product = x.new_empty(min(height, self.like.shape[0]), x.shape[1])
        widened = torch.empty_like(product, dtype=self.total.dtype)
        for start in range(0, self.like.shape[0], height):
            total = self.total[start : start + height]
            p = torch.mm(grad[:, start : start + height].t(), x, out=product[: total.shape[0]])
            if self.first:
                total.copy_(p)
            else:
                total.add_(widened[: total.shape[0]].copy_(p))

    def finish(self) -> Tensor:
        total = self.total
        del self.total  # or it would stay in memory with its narrower copy
        return total.to(self.like.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
