"""One AdamW step on the CPU: FusedAdamW against torch.optim.AdamW(fused=True), DeepSpeedCPUAdam and the memory itself.

stream     _C.stream_4r3w: the same 4 reads and 3 writes of fp32 with next to no arithmetic, the limit for the flat fp32
           cases
flat       one tensor, as a ZeRO shard is
tiny       many small tensors, where the cost is in the calls
bf16 out   bf16 gradients, fp32 parameters, bf16 copy out in the same pass: also 28 bytes per parameter. The peers need
           three passes: gradient to fp32, step, parameter to bf16
quantized  state and parameters as fastft/ops/quantized_state.py stores them. "bytes" is what a step has to read and
           write per parameter, GB/s counts these, "x fp32" is against our own fp32 step with the same kind of gradient
           and a bf16 copy out where the weights are bf16, and the peers do what they can do for the same model:
           fp32 or, with bf16 weights, three passes

    python benchmarks/adamw.py [--machine NAME]        FASTFT_CPU=scalar|avx2|avx512 chooses the instruction set
"""

import common
import torch

from fastft import _C
from fastft.ops.adamw import adamw
from fastft.optim import FusedAdamW

F32, BF16 = torch.float32, torch.bfloat16
FLAT = (1_000_000, 32_000_000, 128_000_000)
TINY = (4000, 500)  # tensors, elements of each
OPTIONS = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
COLUMNS = {
    "case": "s",
    "parameters": ",d",
    "bytes": ".1f",
    "fastft ms": ".2f",
    "torch ms": ".2f",
    "deepspeed ms": ".2f",
    "stream ms": ".2f",
    "fastft GB/s": ".1f",
    "x torch": ".2f",
    "x deepspeed": ".2f",
    "x fp32": ".2f",
    "of stream": ".2f",
    "error": ".1e",
    "torch error": ".1e",
}


def parameters(sizes, dtype=torch.float32) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape).mul_(0.01).to(dtype)
    return params


def optimizers(sizes) -> dict[str, torch.optim.Optimizer]:
    """All on the same tensors and moments: where in memory the pages of two sets lie is worth 3 % by itself."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # compiles itself at first use

    params = parameters(sizes)
    made = {
        "fastft": FusedAdamW(params, **OPTIONS, backend="native"),
        "torch": torch.optim.AdamW(params, **OPTIONS, fused=True),
        "deepspeed": DeepSpeedCPUAdam(params, **OPTIONS, adamw_mode=True),
    }
    for optimizer in made.values():
        optimizer.step()  # makes the state
        for param in params:
            optimizer.state[param].update(
                {name: made["fastft"].state[param][name] for name in ("exp_avg", "exp_avg_sq")}
            )
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


def finish(row, times, bytes_per_parameter=28.0) -> dict:
    row["bytes"] = bytes_per_parameter
    for name, seconds in times.items():
        row[f"{name} ms"] = min(seconds) * 1e3
    row["fastft GB/s"] = bytes_per_parameter * row["parameters"] / min(times["fastft"]) / 1e9
    row["x torch"] = common.speedup(times, "torch", "fastft")
    row["x deepspeed"] = common.speedup(times, "deepspeed", "fastft")
    row["x fp32"] = common.speedup(times, "fp32", "fastft") if "fp32" in times else None
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
        "fastft": lambda: adamw(
            *lists, copies=[half], lr=1e-3, **betas, decoupled=True, maximize=False, backend="native"
        ),
        "torch": lambda: three_passes(made["torch"]),
        "deepspeed": lambda: three_passes(made["deepspeed"]),
        "stream": stream(n),
    }
    return finish({"case": "flat, bf16 out", "parameters": n}, common.interleave(contenders, rounds))


# name -> (dtype of params, of grads, settings of FusedAdamW, bytes per parameter)
LOW_BYTE = {
    "bf16 state": (F32, F32, {"state_dtype": "bf16"}, 20),
    "int8 state": (F32, F32, {"state_dtype": "int8"}, 16 + 16 / 256),
    "remainder": (BF16, BF16, {"remainder": True}, 26),
    "stochastic": (BF16, BF16, {"stochastic_rounding": True}, 22),
    "remainder, int8": (BF16, BF16, {"remainder": True, "state_dtype": "int8"}, 14 + 16 / 256),
    "stochastic, bf16 state": (BF16, BF16, {"stochastic_rounding": True, "state_dtype": "bf16"}, 14),
    "stochastic, int8": (BF16, BF16, {"stochastic_rounding": True, "state_dtype": "int8"}, 10 + 16 / 256),
}


def low_byte(name, n, rounds) -> dict:
    param_dtype, grad_dtype, settings, bytes_per_parameter = LOW_BYTE[name]
    made = optimizers([n])
    param = torch.nn.Parameter(torch.randn(n).to(param_dtype))
    param.grad = torch.randn(n).mul_(0.01).to(grad_dtype)
    ours = FusedAdamW([param], **OPTIONS, **settings, backend="native")
    half, grad = torch.empty(n, dtype=BF16), param.grad

    def three_passes(optimizer):
        (wide,) = optimizer.param_groups[0]["params"]
        wide.grad.copy_(grad)
        optimizer.step()
        half.copy_(wide.detach())

    (wide,) = made["fastft"].param_groups[0]["params"]
    state = [[torch.zeros(n)], [torch.zeros(n)], [], [torch.zeros(())]]
    fp32 = {
        "copies": [half] if param_dtype == BF16 else None,
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.01,
    }
    steps = {peer: made[peer].step for peer in ("torch", "deepspeed")}
    if param_dtype == BF16:
        steps = {peer: lambda peer=peer: three_passes(made[peer]) for peer in steps}
    contenders = {
        "fastft": ours.step,
        **steps,
        "fp32": lambda: adamw([wide.detach()], [grad], *state, **fp32, backend="native"),
    }
    return finish({"case": name, "parameters": n}, common.interleave(contenders, rounds), bytes_per_parameter)


def main():
    args = common.arguments(__doc__.splitlines()[0], rounds=31)
    torch.manual_seed(0)
    ours, theirs = errors()
    flat = [n // 1000 for n in FLAT] if args.quick else FLAT
    rows = [fp32("flat", [n], args.rounds * (10 if n < 10**7 else 1)) for n in flat]
    rows.append(fp32(f"tiny ({TINY[0]} tensors)", [TINY[1]] * TINY[0], args.rounds))
    rows.append(bf16_out(flat[1], args.rounds))
    rows += [low_byte(name, flat[1], args.rounds) for name in LOW_BYTE]
    for row in rows:
        row |= {"error": ours, "torch error": theirs}
    common.record("adamw", args, rows, COLUMNS)


if __name__ == "__main__":
    main()
