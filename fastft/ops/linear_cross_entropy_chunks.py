"""The chunk loop of linear_cross_entropy: logits of some rows at a time,
overwritten by their gradient, used up by the GEMMs.

Of three (N, V) x (V, H) GEMMs per row the forward does one and the gradients one each; no logit is computed twice.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastft.ops import backends, linear_cross_entropy_plan
from fastft.ops.cpu import widens
from fastft.ops.linear_cross_entropy_plan import Plan
from fastft.ops.linear_cross_entropy_sums import Parked, Sum, multiprocessors, sum_of_products, wide

# Where tensor cores want rows of 16-byte multiples. With 50257 bfloat16 classes, 768 wide, each GEMM takes 3 to 5 times
# as long as with 50304 (H200).
ALIGNED_ON = frozenset({"cuda"})
ALIGNMENT = 64  # classes
MODELLED_ON = frozenset({"cuda"})  # where the plan comes from a model of the time, not from bytes alone


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
    dtype = weight.dtype
    if widens(weight):  # of all classes at once: 4 bytes an element, which a chunk's logits take too
        hidden, weight = hidden.float(), weight.float()
        bias, hidden2, weight2 = (None if t is None else t.float() for t in (bias, hidden2, weight2))
    head = _Head(weight, bias, weight2)
    vocab = weight.shape[0]
    # Only the CPU leaves ignored rows out: on CUDA their number would have to come to the host, which stalls the
    # stream.
    compact = lse is None and target.device.type == "cpu"
    kept = torch.nonzero(target != ignore_index)[:, 0] if compact else None
    if kept is not None and kept.numel() == target.shape[0]:
        kept = None
    count = target.shape[0] if kept is None else kept.numel()
    plan = _plan(count, hidden, head, needs, chunk_bytes)
    chunks = plan.chunks(count)
    grads = _Gradients(hidden, head, bias, hidden2, needs, sparse=kept is not None, count=count, plan=plan)
    if kept is not None and loss is not None:
        loss.zero_()
    options = {
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "logit_scale": logit_scale,
    }
    buffer = weight.new_empty(min(plan.size, count), _pitch(head))[:, : head.width]
    padded: Tensor | None = None
    logits: Tensor | None = None
    grad: Tensor | None = None
    # The kernels want one; whoever called has looked.
    bad_row = torch.empty((), dtype=torch.int64, device=target.device)
    for chunk in chunks:
        rows = chunk if kept is None else kept[chunk]
        x, y = _rows(hidden, rows), _rows(target, rows)
        x2, token, scale = (_rows_of(t, rows) for t in (hidden2, token_weight, grad_scale))
        padded = buffer[: y.shape[0]]
        head.logits(padded, x, x2)
        logits = padded[:, :vocab]
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
            padded[:, vocab:].zero_()  # a row with an inf has nan there, and 0 * nan in the GEMMs would spread
            grads.add(padded, x, x2, rows)
    logits = grad = padded = None
    del buffer  # the sums may need as much memory again to become bfloat16
    return [None if grad is None else grad.to(dtype) for grad in grads.finish()]


def _pitch(head: "_Head") -> int:
    """Elements from one row of logits to the next. On a CPU rows a multiple of a page apart meet in the same lines of
    its caches: with 49152 float32 classes the three products take 1.06 to 1.16 times as long (AVX2, MKL).
    """
    if head.weight.device.type == "cpu" and head.width * head.weight.element_size() % 4096 == 0:
        return head.width + 64 // head.weight.element_size()
    return head.width


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


def _plan(count: int, hidden: Tensor, head: "_Head", needs: list[bool], chunk_bytes: int | None) -> Plan:
    weight = head.weight
    if chunk_bytes is None and weight.device.type in MODELLED_ON:
        return linear_cross_entropy_plan.by_model(
            count,
            head.width,
            weight.shape[1],
            weight.element_size(),
            needs[0],
            needs[1],
            multiprocessors(weight.device),
        )
    sum_bytes = weight.numel() * wide(weight.dtype).itemsize if needs[1] and weight.dtype != wide(weight.dtype) else 0
    return linear_cross_entropy_plan.by_bytes(count, head.width, weight.element_size(), chunk_bytes, sum_bytes)


class _Head:
    """The layer: weight (V, H), bias (V,) and weight2 (V, R), in pieces whose GEMMs are aligned.

    One piece where V is. Otherwise the classes up to a multiple of 64, where they lie, and a copy of the few that are
    left, filled up with zeros to 64: a copy of the whole weight would take 1 GB for 128257 x 4096. Logits then have
    columns of padding, up to `width`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, weight2: Tensor | None):
        self.weight, self.weight2 = weight, weight2
        vocab = self.width = weight.shape[0]
        self.pieces: list[tuple[slice, Tensor, Tensor | None, Tensor | None]] = []  # columns, and what makes them
        if weight.device.type not in ALIGNED_ON or vocab * weight.element_size() % 16 == 0:
            self.pieces.append((slice(0, vocab), weight, bias, weight2))
            return
        main = vocab // ALIGNMENT * ALIGNMENT
        self.width = main + ALIGNMENT
        first, rest = (lambda t: t[:main]), (lambda t: self._filled(t[main:]))
        for columns, of in ((slice(0, main), first), (slice(main, self.width), rest))[main == 0 :]:
            others = [None if t is None else of(t) for t in (bias, weight2)]
            self.pieces.append((columns, of(weight), others[0], others[1]))

    @staticmethod
    def _filled(tensor: Tensor) -> Tensor:
        result = tensor.new_zeros(ALIGNMENT, *tensor.shape[1:])
        result[: tensor.shape[0]] = tensor
        return result

    def logits(self, out: Tensor, x: Tensor, x2: Tensor | None) -> None:
        """out (n, width) = x weight^T + bias + x2 weight2^T."""
        for columns, weight, bias, weight2 in self.pieces:
            part = out[:, columns]
            if bias is None:
                torch.mm(x, weight.t(), out=part)
            else:
                torch.addmm(bias, x, weight.t(), out=part)
            if x2 is not None and weight2 is not None:
                part.addmm_(x2, weight2.t())

    def back(self, grad: Tensor, out: Tensor) -> None:
        """out (n, H) = grad weight, for a grad of (n, width)."""
        sum_of_products(out, [(grad[:, columns], weight) for columns, weight, _, _ in self.pieces])

    def back2(self, grad: Tensor, out: Tensor) -> None:
        """out (n, R) = grad weight2."""
        sum_of_products(
            out, [(grad[:, columns], weight2) for columns, _, _, weight2 in self.pieces if weight2 is not None]
        )


class _Gradients:
    """The five gradients, each made only when it is wanted."""

    def __init__(
        self,
        hidden: Tensor,
        head: _Head,
        bias: Tensor | None,
        hidden2: Tensor | None,
        needs: list[bool],
        sparse: bool,
        count: int,
        plan: Plan,
    ):
        make = torch.zeros_like if sparse else torch.empty_like  # sparse: rows that no chunk touches stay 0
        self.head, self.bias = head, bias
        chunks = len(plan.chunks(count))
        self.of_hidden = make(hidden, memory_format=torch.contiguous_format) if needs[0] else None
        self.of_weight: Sum | Parked | None = None
        if needs[1] and plan.parked:
            self.of_weight = Parked(head.weight, head.width, plan.parked, count)
        elif needs[1]:
            self.of_weight = Sum(head.weight, head.width, chunks)
        self.of_bias = None
        if needs[2] and bias is not None:
            self.of_bias = torch.zeros(bias.shape, dtype=wide(bias.dtype), device=bias.device)
        self.of_hidden2 = None
        if needs[3] and hidden2 is not None:
            self.of_hidden2 = make(hidden2, memory_format=torch.contiguous_format)
        self.of_weight2 = None
        if needs[4] and head.weight2 is not None:
            self.of_weight2 = Sum(head.weight2, head.width, chunks)

    def add(self, grad: Tensor, x: Tensor, x2: Tensor | None, rows: slice | Tensor) -> None:
        """grad: (n, width) gradient of this chunk's logits, 0 in the padding."""
        for out, back in ((self.of_hidden, self.head.back), (self.of_hidden2, self.head.back2)):
            if out is None:
                continue
            part = out[rows] if isinstance(rows, slice) else out.new_empty(len(rows), *out.shape[1:])
            back(grad, part)
            if not isinstance(rows, slice):
                out.index_copy_(0, rows, part)
        if self.of_weight is not None:
            self.of_weight.add(grad, x)
        if self.of_weight2 is not None and x2 is not None:
            self.of_weight2.add(grad, x2)
        if self.of_bias is not None:
            self.of_bias += grad[:, : len(self.of_bias)].sum(0, dtype=self.of_bias.dtype)

    def finish(self) -> list[Tensor | None]:
        """In the order of `needs`, in the parameters' dtypes."""
        sums = [None if s is None else s.finish() for s in (self.of_weight, self.of_weight2)]
        of_bias = None if self.of_bias is None or self.bias is None else self.of_bias.to(self.bias.dtype)
        return [self.of_hidden, sums[0], of_bias, self.of_hidden2, sums[1]]
