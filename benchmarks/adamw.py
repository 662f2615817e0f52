"""One AdamW step on the CPU: FusedAdamW against torch.optim.AdamW(fused=True), DeepSpeedCPUAdam and the memory itself.

stream     _C.stream_4r3w: the same 4 reads and 3 writes of fp32 with next to no arithmetic, the limit for the flat fp32 cases
flat       one tensor, as a ZeRO shard is
tiny       many small tensors, where the cost is in the calls
bf16 out   bf16 gradients, fp32 parameters, bf16 copy out in the same pass: also 28 bytes per parameter. The peers need three passes:
           gradient to fp32, step, parameter to bf16

    python benchmarks/adamw.py [--machine NAME]
"""

import copy

import common
import torch

from fastft import _C
from fastft.ops.adamw import adamw
from fastft.optim import FusedAdamW

FLAT = (1_000_000, 32_000_000, 128_000_000)
TINY = (4000, 500)  # tensors, elements of each
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
COLUMNS = {
    "case": "s", "parameters": ",d", "fastft ms": ".2f", "torch ms": ".2f", "deepspeed ms": ".2f", "stream ms": ".2f", "fastft GB/s": ".1f",
    "x torch": ".2f", "x deepspeed": ".2f", "of stream": ".2f", "error": ".1e", "torch error": ".1e",
}  # fmt: skip


def parameters(sizes, dtype=torch.float32) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape).mul_(0.01).to(dtype)
    return params


def optimizers(sizes) -> dict[str, torch.optim.Optimizer]:
    """Each on its own tensors of the same values."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles itself at first use

    first = parameters(sizes)
    made = {}
    for name, make in (
        ("fastft", lambda p: FusedAdamW(p, **OPTIONS, backend="native")),
        ("torch", lambda p: torch.optim.AdamW(p, **OPTIONS, fused=True)),
        ("deepspeed", lambda p: DeepSpeedCPUAdam(p, **OPTIONS, adamw_mode=True)),
    ):
        params = copy.deepcopy(first)
        for mine, theirs in zip(params, first, strict=True):
            mine.grad = theirs.grad.clone()
        made[name] = make(params)
    return made


def errors() -> tuple[float, float]:
    """Largest error of the parameters after 3 steps, ours and torch's, against torch in float64."""
    start = parameters([100_003, 17, 1])
    grads = [[torch.randn(p.shape).mul_(0.01) for p in start] for _ in range(3)]

    def run(dtype, make):
        params = [torch.nn.Parameter(p.detach().to(dtype, copy=True)) for p in start]
        optimizer = make(params)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.to(dtype)
            optimizer.step()
        return torch.cat([p.detach() for p in params])

    truth = run(torch.float64, lambda p: torch.optim.AdamW(p, **OPTIONS, foreach=False, fused=False))
    peer = run(torch.float32, lambda p: torch.optim.AdamW(p, **OPTIONS, fused=True))
    got = run(torch.float32, lambda p: FusedAdamW(p, **OPTIONS, backend="native"))
    return common.check("parameters", got, peer, truth, tiny=1e-9)


def stream(n):
    p, g, m, v = (torch.zeros(n) for _ in range(4))
    arrays = {"p": p.data_ptr(), "g": g.data_ptr(), "m": m.data_ptr(), "v": v.data_ptr()}
    return lambda _keep=(p, g, m, v): _C.stream_4r3w(**arrays, n=n, num_threads=0)


def finish(row, times, bytes_per_parameter=28) -> dict:
    for name, seconds in times.items():
        row[f"{name} ms"] = min(seconds) * 1e3
    row["fastft GB/s"] = bytes_per_parameter * row["parameters"] / min(times["fastft"]) / 1e9
    row["x torch"] = common.speedup(times, "torch", "fastft")
    row["x deepspeed"] = common.speedup(times, "deepspeed", "fastft")
    row["of stream"] = common.speedup(times, "stream", "fastft") if "stream" in times else None
    return row


def fp32(case, sizes, rounds) -> dict:
    made = optimizers(sizes)
    contenders = {name: optimizer.step for name, optimizer in made.items()}
    if len(sizes) == 1:
        contenders["stream"] = stream(sizes[0])
    return finish({"case": case, "parameters": sum(sizes)}, common.interleave(contenders, rounds))


def bf16_out(n, rounds) -> dict:
    """Mixed precision as ZeRO does it on fp32 master parameters."""
    made = optimizers([n])
    grad = torch.randn(n).mul_(0.01).bfloat16()
    half = torch.empty(n, dtype=torch.bfloat16)
    (p,) = made["fastft"].param_groups[0]["params"]
    m, v, step = torch.zeros(n), torch.zeros(n), torch.zeros(())
    lists = [[p.detach()], [grad], [m], [v], [], [step]]
    betas = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}

    def three_passes(optimizer):
        (param,) = optimizer.param_groups[0]["params"]
        param.grad.copy_(grad)
        optimizer.step()
        half.copy_(param.detach())

    contenders = {
        "fastft": lambda: adamw(*lists, copies=[half], lr=1e-3, **betas, decoupled=True, maximize=False, backend="native"),
        "torch": lambda: three_passes(made["torch"]),
        "deepspeed": lambda: three_passes(made["deepspeed"]),
        "stream": stream(n),
    }
    return finish({"case": "flat, bf16 out", "parameters": n}, common.interleave(contenders, rounds))


def main():
    args = common.arguments(__doc__.splitlines()[0])
    torch.manual_seed(0)
    ours, theirs = errors()
    flat = [n // 1000 for n in FLAT] if args.quick else FLAT
    rows = [fp32("flat", [n], args.rounds) for n in flat]
    rows.append(fp32(f"tiny ({TINY[0]} tensors)", [TINY[1]] * TINY[0], args.rounds))
    rows.append(bf16_out(flat[1], args.rounds))
    for row in rows:
        row |= {"error": ours, "torch error": theirs}
    common.record("adamw", args, rows, COLUMNS)


if __name__ == "__main__":
    main()
