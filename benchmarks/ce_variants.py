"""Variants of the cross-entropy kernel on the GPU at hand, in place, as a share of a copy measured in the same run.

    python benchmarks/ce_variants.py [--variants 1 0 8 16 208 408] [--seconds 55] [--compile] [--out FILE]
    [--device cpu --quick]

Variants are those of fastft/_C.pyi: 1 the kernels that need no sm_90, 0 the choice of the library, 8 and 16 warps, plus
100 * the fewest blocks a row. Beside them the Triton backend, torch and, where it can be imported, Liger; --compile
adds torch.compile. Each is checked against float64 first: a wrong value is shouted about, and the run goes on. A line
of JSON per result is appended at once, and nothing new starts after --seconds. --device cpu and --quick only show that
the script runs.
"""

import argparse
import functools
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from cross_entropy import kernel as call_kernel
from gpu import importable

from fastft.ops import cross_entropy

OUT = Path(__file__).resolve().parent / "results" / "ce_variants.jsonl"
BF16, F32 = torch.bfloat16, torch.float32
VOCABS = (32000, 50257, 128256, 151936, 256000)
VARIANTS = (0, 1, 8, 16, 208, 408, 216, 416)
SLOTS = 7  # csrc/cuda/cross_entropy_bulk.cuh


def plan(vocab: int, size: int, variant: int) -> tuple[int, int, str] | None:
    """Warps, blocks a row, slots that a slice takes of the ring; None when the variant cannot do such a row.

    As Shape and plan() in csrc/cuda/cross_entropy_bulk.cuh.
    """
    for warps in (8, 16):
        if variant % 100 not in (0, warps):
            continue
        ranks = 1
        while ranks <= warps // 2:
            share = ((vocab * size // 16 + 7) // ranks + 8) // 8 * 8
            unit = warps * 128
            if ranks >= variant // 100 and share <= (SLOTS - 2) * unit:
                return warps, ranks, f"{-(-share // unit)} of {SLOTS}"
            ranks *= 2
    return None


def kernel(logits, target, scale, loss, bad_row, variant: int, forward: bool = False) -> None:
    """_C.cross_entropy alone: the gradient of the mean in place of the logits, or the loss alone."""
    more = {"variant": variant}
    if logits.is_cuda:
        more |= {"device": logits.device.index, "stream": torch.cuda.current_stream().cuda_stream}
    call_kernel(logits, target, None if forward else logits, loss, scale, bad_row, **more)


class Run:
    """Where results go, and when to stop."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, torch.device(args.device, 0 if args.device == "cuda" else None)
        self.start = time.monotonic()
        self.cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.about = {"date": time.strftime("%Y-%m-%d"), "device": name, "torch": torch.__version__}
        n = 1 << (16 if args.quick else 29)
        x, y = torch.ones(n, device=self.device), torch.empty(n, device=self.device)
        self.copy = 8 * n / self.time(lambda: y.copy_(x))
        self.add({"contender": "copy", "gb_s": round(self.copy / 1e9)})

    def time(self, call) -> float:
        """Median seconds."""
        if self.cuda:
            from triton.testing import do_bench

            return do_bench(call, warmup=10, rep=50, return_mode="median") / 1e3
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def over(self) -> bool:
        return time.monotonic() - self.start > self.args.seconds

    def add(self, row: dict) -> None:
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
        if not self.args.quick:
            self.args.out.parent.mkdir(parents=True, exist_ok=True)
            with open(self.args.out, "a") as file:
                file.write(json.dumps({**self.about, **row}) + "\n")

    def contender(self, case: dict, name: str, call, size: int, wrong: str = "", **more) -> None:
        """Times a call that has to move `size` bytes."""
        if self.over():
            return
        row = {**case, "contender": name, **more}
        if wrong:
            row["wrong"] = wrong
            print(f"\n!!!!!!!! WRONG: {name} {case}: {wrong} !!!!!!!!\n", flush=True)
        try:
            call()
            seconds = self.time(call)
        except Exception as error:
            self.add({**row, "error": f"{type(error).__name__}: {error}"[:200]})
            return
        rate = size / seconds
        self.add({**row, "ms": seconds * 1e3, "gb_s": round(rate / 1e9), "of_copy": round(rate / self.copy, 3)})


def wrong_values(logits, target, loss, grad, scale: float, rows: list[int]) -> str:
    """What is wrong with these rows' loss and gradient beside float64; "" when nothing is."""
    x = logits[rows].double().requires_grad_()
    truth = F.cross_entropy(x, target[rows], reduction="none")
    (want,) = torch.autograd.grad(truth.sum() * scale, x)
    found = []
    if loss is not None:
        off = ((loss[rows].double() - truth).abs() / truth.clamp(min=1)).max().item()
        if not off < 2e-6:
            found.append(f"loss off by {off:.2g}")
    if grad is not None:
        relative = 2.0**-8 if logits.dtype == BF16 else 3e-5
        error = (grad[rows].double() - want).abs() / (want.abs() + 1e-9 * scale)
        if not error.max().item() < relative:
            found.append(f"gradient off by {error.max().item():.2g}, {int((~(error < relative)).sum())} elements")
    return ", ".join(found)


def kernels(run: Run, case: dict, original: torch.Tensor, target: torch.Tensor) -> None:
    """The variants, in a copy of the logits."""
    logits, rows = original.clone(), len(original)
    scale, loss = torch.tensor(1.0 / rows, device=run.device), torch.empty(rows, device=run.device)
    bad_row = torch.zeros((), dtype=torch.int64, device=run.device)
    size, some = logits.numel() * logits.element_size(), [0, 1, rows // 2, rows - 1]
    for variant in run.args.variants:
        planned = plan(case["vocab"], logits.element_size(), variant)
        if run.over() or (variant != 1 and planned is None):
            continue
        what = {} if variant == 1 or planned is None else dict(zip(("warps", "blocks", "slots"), planned, strict=True))
        for forward in (False, True) if variant in (0, 1) else (False,):
            logits.copy_(original)
            loss.fill_(-1)
            call = functools.partial(kernel, logits, target, scale, loss, bad_row, variant, forward)
            call()
            wrong = wrong_values(original, target, loss, None if forward else logits, 1.0 / rows, some)
            label = f"variant {variant}{' forward' if forward else ''}"
            run.contender(case, label, call, size if forward else 2 * size, wrong, **what)


def peers(run: Run, case: dict, original: torch.Tensor, target: torch.Tensor) -> None:
    leaf = original.requires_grad_()

    def both(loss_of):
        return torch.autograd.grad(loss_of(leaf, target), leaf)

    calls = {"torch": lambda: both(F.cross_entropy)}
    if run.cuda:  # in place: from here on the logits are what it makes of them
        calls["triton in place"] = lambda: torch.autograd.grad(
            cross_entropy(leaf.view_as(leaf), target, inplace=True, backend="triton"), leaf
        )
    if liger := importable("liger_kernel.transformers.functional"):
        calls["liger"] = lambda: both(lambda x, y: liger.liger_cross_entropy(x, y))
    if run.args.compile:
        compiled = torch.compile(F.cross_entropy, dynamic=False)
        calls["torch.compile"] = lambda: both(compiled)
    size = 2 * original.numel() * original.element_size()
    for label, call in calls.items():
        run.contender(case, label, call, size)


def shape(run: Run, dtype: torch.dtype, vocab: int, rows: int) -> None:
    """All contenders on one shape."""
    case = {"dtype": str(dtype).removeprefix("torch."), "vocab": vocab, "rows": rows}
    original = (3 * torch.randn(rows, vocab, device=run.device, dtype=BF16)).to(dtype)
    target = torch.randint(vocab, (rows,), device=run.device)
    kernels(run, case, original, target)
    peers(run, case, original, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", type=int, nargs="*", default=VARIANTS)
    parser.add_argument("--vocabs", type=int, nargs="*", default=VOCABS)
    parser.add_argument("--seconds", type=float, default=55.0)
    parser.add_argument("--compile", action="store_true", help="torch.compile too; some seconds a shape")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing recorded: does it run?")
    run = Run(args := parser.parse_args())
    for vocab in args.vocabs:
        for dtype in (BF16, F32):
            if run.over():
                print(f"stopped after {args.seconds} seconds, before {dtype} {vocab}")
                return
            rows = 4096 if dtype == F32 and vocab > 200000 else 8192
            shape(run, dtype, 997 if args.quick else vocab, 7 if args.quick else rows)
            if run.cuda:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
