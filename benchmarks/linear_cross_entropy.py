"""Hidden states to loss and both gradients: fastft against torch's ways and against the three GEMMs alone, on the CPU.

GEMMs      logits, d hidden and d weight as three torch.mm into arrays that are there: the floor
fastft     linear_cross_entropy(hidden, weight, target), then the gradients of hidden and weight
torch      F.linear_cross_entropy without options, that is F.cross_entropy(F.linear(hidden, weight), target): holds all
           logits
chunked    F.linear_cross_entropy with LinearCrossEntropyOptions(). It passes over d weight in float32 for every few
           rows, so it runs once, on "chunked rows", and fastft beside it on as many: all 2048 rows of the first shape
           took it 34 s

Memory is measured in processes of their own: how far one forward and backward raises the resident set above the inputs,
less the two gradients, which everyone returns; as a share of logits and their gradient, 2 rows * vocab elements. Liger
Kernel is not here: its fused linear cross-entropy is Triton for GPUs and does not run on CPU tensors.

    python benchmarks/linear_cross_entropy.py [--keep-heap] [--machine NAME] [--rounds 4]
"""

import subprocess
import sys

import common
import torch
import torch.nn.functional as F

from fastft.ops import linear_cross_entropy

BF16, F32 = torch.bfloat16, torch.float32
# (dtype, hidden, vocab, rows, share of ignored targets)
CASES = [
    (BF16, 768, 50257, 2048, 0.0),
    (BF16, 768, 50257, 2048, 0.5),
    (BF16, 768, 50257, 2048, 0.9),
    (BF16, 896, 151936, 1024, 0.0),
    (BF16, 4096, 32000, 1024, 0.0),
    (BF16, 4096, 128256, 1024, 0.0),
    (BF16, 3584, 152064, 1024, 0.0),
    (BF16, 2304, 256000, 1024, 0.0),
    (F32, 768, 50257, 1024, 0.0),
]
MEMORY = [(BF16, 768, 50257, 8192), (F32, 768, 50257, 4096)]
COLUMNS = {
    "dtype": "s",
    "hidden": "d",
    "vocab": "d",
    "rows": "d",
    "ignored": ".0%",
    "GEMMs ms": ".0f",
    "fastft ms": ".0f",
    "torch ms": ".0f",
    "fastft / GEMMs": ".2f",
    "x torch": ".2f",
    "x chunked": ".1f",
    "chunked rows": "d",
    "fastft memory": ".1%",
    "torch memory": ".0%",
    "error": ".1e",
    "torch error": ".1e",
}


def inputs(dtype, hidden, vocab, rows, ignored=0.0):
    torch.manual_seed(0)
    h = torch.randn(rows, hidden, dtype=dtype).requires_grad_()
    w = torch.randn(vocab, hidden, dtype=dtype).mul_(2 / hidden**0.5).requires_grad_()
    target = torch.randint(0, vocab, (rows,))
    target[torch.rand(rows) < ignored] = -100
    return h, w, target


def gradients_of(name: str):
    """A function (h, w, target) -> (loss, d h, d w)."""

    loss_of = {
        "fastft": lambda h, w, t: linear_cross_entropy(h, w, t, backend="native"),
        "torch": lambda h, w, t: F.cross_entropy(F.linear(h, w), t),
        "chunked": lambda h, w, t: F.linear_cross_entropy(h, w, t, options=torch.nn.LinearCrossEntropyOptions()),
    }[name]

    def run(h, w, target):
        loss = loss_of(h, w, target)
        return loss.detach(), *torch.autograd.grad(loss, (h, w))

    return run


def errors(h, w, target) -> tuple[float, float]:
    """Largest relative-to-largest errors of d hidden, ours and torch's, on 16 rows;
    loss and d weight (of some classes) are checked too.
    """
    few = target.clone()
    few = few[few != -100][:16]
    x, vocab = h.detach()[:16], w.shape[0]
    slices = range(0, vocab, 8192)  # float64 of the whole weight would need gigabytes
    logits = torch.cat([x.double() @ w.detach()[i : i + 8192].double().t() for i in slices], 1)
    true_loss = F.cross_entropy(logits, few)
    g = torch.softmax(logits, 1)
    g[torch.arange(16), few] -= 1
    g /= 16
    true_dh = sum(g[:, i : i + 8192] @ w.detach()[i : i + 8192].double() for i in slices)
    classes = torch.cat([few, torch.randint(0, vocab, (2048,))])
    true_dw = g[:, classes].t() @ x.double()
    leaf = x.clone().requires_grad_()
    got, peer = (gradients_of(name)(leaf, w, few) for name in ("fastft", "torch"))
    common.check("loss", got[0], peer[0], true_loss, tiny=1e-5 * true_loss.item())
    common.check("d weight", got[2][classes], peer[2][classes], true_dw, tiny=1e-6 * true_dw.abs().max().item())
    ours, theirs = common.check("d hidden", got[1], peer[1], true_dh, tiny=1e-5 * true_dh.abs().max().item())
    return ours / true_dh.abs().max().item(), theirs / true_dh.abs().max().item()


def case(dtype, hidden, vocab, rows, ignored, rounds) -> dict:
    h, w, target = inputs(dtype, hidden, vocab, rows, ignored)
    ours, theirs = errors(h, w, target)
    x, y = h.detach(), w.detach()
    logits, dh, dw = torch.empty(rows, vocab, dtype=dtype), torch.empty_like(x), torch.empty_like(y)

    def gemms():
        torch.mm(x, y.t(), out=logits)
        torch.mm(logits, y, out=dh)
        torch.mm(logits.t(), x, out=dw)

    runs = {name: gradients_of(name) for name in ("fastft", "torch", "chunked")}
    contenders = {
        "GEMMs": gemms,
        "fastft": lambda: runs["fastft"](h, w, target),
        "torch": lambda: runs["torch"](h, w, target),
    }
    times = common.interleave(contenders, rounds, warmup=1)
    row = {
        "dtype": str(dtype).removeprefix("torch."),
        "hidden": hidden,
        "vocab": vocab,
        "rows": rows,
        "ignored": ignored,
        "error": ours,
        "torch error": theirs,
        "fastft / GEMMs": 1 / common.speedup(times, "GEMMs", "fastft"),
    }
    row |= {f"{name} ms": min(seconds) * 1e3 for name, seconds in times.items()} | {
        "x torch": common.speedup(times, "torch", "fastft")
    }
    if hasattr(F, "linear_cross_entropy") and ignored == 0:  # torch 2.13
        few = min(rows, 256 if hidden * vocab < 5e7 else 16 if hidden * vocab < 2e8 else 2)
        pair = {name: lambda run=runs[name]: run(h[:few], w, target[:few]) for name in ("fastft", "chunked")}
        row |= {
            "chunked rows": few,
            "x chunked": common.speedup(common.interleave(pair, 1, warmup=0), "chunked", "fastft"),
        }
    return row


def memory(dtype, hidden, vocab, rows) -> dict:
    row = {"dtype": str(dtype).removeprefix("torch."), "hidden": hidden, "vocab": vocab, "rows": rows, "ignored": 0.0}
    for name in ("fastft", "torch"):
        command = [sys.executable, __file__, "--measure", name, row["dtype"], *map(str, (hidden, vocab, rows))]
        used = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
        outputs = (rows + vocab) * hidden * dtype.itemsize
        row[f"{name} memory"] = (used - outputs) / (2 * rows * vocab * dtype.itemsize)
    return row


def measure(name: str, dtype: str, *sizes: str) -> None:
    """In a process of its own: prints by how many bytes one forward and backward raised the largest resident set."""
    run = gradients_of(name)
    small = inputs(getattr(torch, dtype), 64, 1000, 64)
    run(*small)  # code is compiled, threads are there
    arguments = inputs(getattr(torch, dtype), *map(int, sizes))
    before, peak = common.peak_memory(lambda: run(*arguments))
    print(peak - before)


def main():
    if sys.argv[1:2] == ["--measure"]:
        return measure(*sys.argv[2:])
    args = common.arguments(__doc__.splitlines()[0], rounds=4)
    cases = [(d, h // 8, v // 8, r // 4, i) for d, h, v, r, i in CASES] if args.quick else CASES
    shapes = [(d, h // 8, v // 8, r // 4) for d, h, v, r in MEMORY] if args.quick else MEMORY
    rows = []
    for measured, parameters in [(case, (*c, args.rounds)) for c in cases] + [(memory, s) for s in shapes]:
        rows.append(measured(*parameters))
        print(rows[-1], file=sys.stderr, flush=True)  # minutes pass until the table
    common.record("linear_cross_entropy", args, rows, COLUMNS)


if __name__ == "__main__":
    main()
