"""Forward and backward of cross-entropy: fastft's native backend against torch.nn.functional.cross_entropy, on the CPU.

fastft     cross_entropy(logits, target), then the gradient of the logits, into a new (N, V) array
in place   the same with inplace=True: the logits become the gradient
kernel     _C.cross_entropy alone, into an array that is kept between calls

    python benchmarks/cross_entropy.py [--keep-heap] [--machine NAME]
"""

import common
import torch
import torch.nn.functional as F

from fastft import _C
from fastft.ops.cross_entropy import cross_entropy

CASES = [(32000, 2048), (50257, 1024), (151936, 512)]  # (vocab, rows)
COLUMNS = {
    "dtype": "s",
    "vocab": "d",
    "rows": "d",
    "torch ms": ".1f",
    "fastft ms": ".1f",
    "in place ms": ".1f",
    "kernel ms": ".1f",
    "fastft x": ".1f",
    "in place x": ".1f",
    "kernel x": ".1f",
    "kernel GB/s": ".0f",
    "error": ".1e",
    "torch error": ".1e",
}


def kernel(logits, target, grad, loss, scale, bad_row, **more):
    """_C.cross_entropy: the loss, and its gradient into ``grad`` unless that is None; ``more``: further arguments of
    it, or other values.
    """
    arguments = {
        "device": -1,
        "stream": 0,
        "logits": logits.data_ptr(),
        "dtype": _C.F32 if logits.dtype == torch.float32 else _C.BF16,
        "rows": logits.shape[0],
        "vocab": logits.shape[1],
        "logits_stride": logits.stride(0),
        "target": target.data_ptr(),
        "class_weight": 0,
        "token_weight": 0,
        "token_weight_stride": 0,
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "softcap": 0.0,
        "logit_scale": 1.0,
        "loss": loss.data_ptr(),
        "lse": 0,
        "grad": 0 if grad is None else grad.data_ptr(),
        "grad_stride": 0 if grad is None else grad.stride(0),
        "grad_scale": scale.data_ptr(),
        "grad_scale_stride": 0,
        "bad_row": bad_row.data_ptr(),
        "num_threads": 0,
    }
    _C.cross_entropy(**{**arguments, **more})


def errors(logits, target) -> tuple[float, float]:
    """Largest errors of the gradient of the sum, ours and torch's; the losses are checked too."""

    def both(function, dtype, **kw):
        x = logits.detach().to(dtype).requires_grad_()
        loss = function(x, target, reduction="sum", **kw)
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    truth = both(F.cross_entropy, torch.float64)
    peer = both(F.cross_entropy, logits.dtype)
    got = both(cross_entropy, logits.dtype, backend="native")
    common.check("loss", got[0], peer[0], truth[0], tiny=1e-7 * truth[0].item())
    return common.check("gradient", got[1], peer[1], truth[1], tiny=1e-7)


def case(dtype, vocab, rows, rounds) -> dict:
    logits = torch.randn(rows, vocab).mul_(2).to(dtype).requires_grad_()
    buffer = logits.detach().clone()
    target = torch.randint(0, vocab, (rows,))
    target[::10] = -100
    few = 64  # float64 truth of 512 x 151936 would need gigabytes
    ours, theirs = errors(logits[:few], target[:few])
    grad, loss, scale = torch.empty_like(buffer), torch.empty(rows), torch.tensor(1.0 / rows)
    bad_row = torch.zeros((), dtype=torch.int64)

    def in_place():
        leaf = buffer.requires_grad_()
        torch.autograd.grad(cross_entropy(leaf.view_as(leaf), target, inplace=True, backend="native"), leaf)

    times = common.interleave(
        {
            "torch": lambda: torch.autograd.grad(F.cross_entropy(logits, target), logits),
            "fastft": lambda: torch.autograd.grad(cross_entropy(logits, target, backend="native"), logits),
            "in place": in_place,
            "kernel": lambda: kernel(logits, target, grad, loss, scale, bad_row),
        },
        rounds,
    )
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "vocab": vocab,
        "rows": rows,
        "error": ours,
        "torch error": theirs,
    }
    for name, seconds in times.items():
        row[f"{name} ms"] = min(seconds) * 1e3
        row[f"{name} x"] = common.speedup(times, "torch", name)
    # Read once, write once: the floor for a gradient in another array. Ignored rows are written but not read.
    row["kernel GB/s"] = 1.9 * logits.numel() * logits.element_size() / min(times["kernel"]) / 1e9
    return row


def main():
    args = common.arguments(__doc__.splitlines()[0])
    torch.manual_seed(0)
    cases = [(vocab, 32 if args.quick else rows) for vocab, rows in CASES]
    rows = [case(dtype, *shape, args.rounds) for dtype in (torch.float32, torch.bfloat16) for shape in cases]
    common.record("cross_entropy", args, rows, COLUMNS)


if __name__ == "__main__":
    main()
