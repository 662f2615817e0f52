"""Every native kernel once or twice on small inputs, for tools that slow it down a hundredfold.

    compute-sanitizer --tool memcheck python benchmarks/gpu_small.py [--device cpu]

Odd and even numbers of classes, rows that begin off a 16-byte boundary, in place and not, with every option; AdamW's
state in every format; heads with padding and with parked gradients. Nothing is timed and nothing compared: the tests do
that.
"""

import argparse

import torch

from fastft.ops import cross_entropy, linear_cross_entropy, linear_cross_entropy_chunks, sum_squares
from fastft.ops.linear_cross_entropy_plan import Plan
from fastft.optim import FusedAdamW


def losses(device: str) -> None:
    for vocab in (11, 507, 5003, 32000, 50257):
        for dtype in (torch.float32, torch.bfloat16):
            for offset in (0, 1):
                memory = torch.randn(3 * vocab + offset, device=device).to(dtype)
                logits = memory[offset:].view(3, vocab).requires_grad_()
                target = torch.tensor([0, -100, vocab - 1], device=device)
                for options in ({}, {"label_smoothing": 0.1}, {"softcap": 5.0, "z_loss": 1e-3}, {"inplace": True}):
                    given = logits.clone() if "inplace" in options else logits
                    cross_entropy(given, target, backend="native", **options).backward()
                cross_entropy(logits.detach(), target, backend="native", reduction="none", return_lse=True)


def heads(device: str) -> None:
    by_default = linear_cross_entropy_chunks._plan
    for vocab in (129, 640, 5003):
        hidden = torch.randn(48, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocab, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
        target = torch.randint(vocab, (48,), device=device)
        for plan in (Plan(48), Plan(16), Plan(16, parked=32)):
            linear_cross_entropy_chunks._plan = lambda *_, plan=plan: plan
            linear_cross_entropy(hidden, weight, target, backend="native").backward()
    linear_cross_entropy_chunks._plan = by_default


def optimizers(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for state in ("fp32", "bf16", "int8"):
            params = [torch.nn.Parameter(torch.randn(n, device=device, dtype=dtype)) for n in (1, 255, 8193)]
            for p in params:
                p.grad = torch.randn_like(p)
            sum_squares([p.grad for p in params if p.grad is not None], backend="native")
            options = {"state_dtype": state, "stochastic_rounding": dtype == torch.bfloat16, "backend": "native"}
            FusedAdamW(params, lr=1e-3, **options).step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    for part in (losses, heads, optimizers):
        part(device)
        if device == "cuda":
            torch.cuda.synchronize()
        print(part.__name__, "done", flush=True)


if __name__ == "__main__":
    main()
