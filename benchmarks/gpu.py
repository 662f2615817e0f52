"""Every kernel on the GPU at hand: the ceilings of the device first,
then each case checked against float64, then timed beside its peers.

    python benchmarks/gpu.py [ceilings adamw sum_squares cross_entropy linear_cross_entropy] [--machine NAME] [--quick]
    [--device cpu] [--out FILE] [--plans]

benchmarks/gpu.sh runs it, after a build and the tests. Times are medians over repeats with the device's own clock
(triton.testing.do_bench, which empties the L2 cache before each). Peers take part where they can be imported. Rows go
to FILE (benchmarks/results/gpu.jsonl) as they come, with device and versions, and as a table to the output; a contender
or a case that fails is a row with its error. Lines that begin with SHORT name what missed its goal or failed, and make
the exit status 3. --plans: linear_cross_entropy in many ways of dividing its rows instead of beside its peers, to hold
the model of linear_cross_entropy_plan.py to. --device cpu and --quick only show that the script runs.
"""

import argparse
import importlib
import json
import statistics
import time
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F

from fastft.ops import backends, cross_entropy, linear_cross_entropy, linear_cross_entropy_chunks, sum_squares
from fastft.ops.adamw import adamw
from fastft.ops.linear_cross_entropy_plan import Plan

RESULTS = Path(__file__).resolve().parent / "results" / "gpu.jsonl"
BF16, F32 = torch.bfloat16, torch.float32
LOGITS = ((8192, 32000), (8192, 50257), (4096, 128256), (4096, 151936), (2048, 256000))  # rows, classes
HEADS = (  # rows, width, classes
    (8192, 4096, 128256),
    (8192, 2304, 256000),
    (8192, 896, 151936),
    (8192, 2048, 32000),
    (8192, 768, 50257),
)
GOALS = {"adamw": 0.95, "sum_squares": 0.95, "cross_entropy": 0.85, "linear_cross_entropy": 0.85}  # of the ceiling
PEERS = ("liger_kernel", "cut_cross_entropy", "quack", "apex", "transformer_engine", "bitsandbytes", "triton")
DO_BENCH_MS = (25, 100)  # warm-up and repeats
SHORT = 3  # exit status where something missed its goal or failed, and was said


class Bench:
    """Where it runs, the ceilings measured there, and the rows found so far."""

    def __init__(self, device: str, quick: bool, machine: str | None, out: Path, plans: bool):
        self.device, self.quick, self.out, self.plans = torch.device(device), quick, out, plans
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.run = {"date": time.strftime("%Y-%m-%d"), "device": machine or name, "versions": _versions()}
        self.copy_rate = self.gemm_rate = float("nan")  # bytes/s, flops/s
        self.rows: list[dict] = []

    def size(self, n: int) -> int:
        return max(7, n // 1000) if self.quick else n

    def time(self, call) -> float:
        """Median seconds of one call."""
        if self.device.type == "cuda":
            from triton.testing import do_bench

            return do_bench(call, warmup=DO_BENCH_MS[0], rep=DO_BENCH_MS[1], return_mode="median") / 1e3
        times = []
        for _ in range(3):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak(self, call) -> int:
        """Bytes allocated at most while calling, above what was there."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before

    def contenders(
        self, case: dict, calls: dict, floor_bytes: float = 0.0, flops: float = 0.0, output_bytes: int = 0
    ) -> None:
        """Times each call and records a row: against the first (ours) and the floor by the measured ceilings.

        output_bytes: of what a call returns, which beyond_mib leaves out.
        """
        floor = max(floor_bytes / self.copy_rate, flops / self.gemm_rate) if floor_bytes or flops else float("nan")
        ours = float("nan")
        for name, call in calls.items():
            row = {**case, "contender": name}
            try:
                call()
                peak = self.peak(call)
                row |= {"peak_mib": round(peak / 2**20, 1), "beyond_mib": round((peak - output_bytes) / 2**20, 1)}
                seconds = self.time(call)
            except Exception as error:
                self.failed(row, error)
                continue
            ours = seconds if ours != ours else ours
            self.add({**row, "ms": seconds * 1e3, "x_ours": seconds / ours, "of_ceiling": floor / seconds})

    def failed(self, row: dict, error: BaseException) -> None:
        self.add({"contender": "", **row, "error": f"{type(error).__name__}: {error}"[:300]})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if not self.quick:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            with open(self.out, "a") as file:  # at once: a run that is cut off keeps what it has
                file.write(json.dumps({**self.run, **row}) + "\n")


def _versions() -> dict[str, str]:
    found = {"torch": torch.__version__, "cuda": torch.version.cuda}
    for name in PEERS:
        try:
            found[name] = metadata.version(name.replace("_", "-"))
        except metadata.PackageNotFoundError:
            continue
    return found


def importable(name: str):
    """The module, or None where it cannot be had."""
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError):
        return None


def ours_on(device: torch.device, op: str) -> list[str]:
    """Our backends that can do this op here, the one that is chosen unasked first."""
    found = [
        name
        for name in backends.names(op)
        if not backends.why_not(op, name, device.type, (F32, F32) if op == "adamw" else (F32,))
    ]
    return [name for name in found if name != "reference"] or found


def check(what: str, got: torch.Tensor, peer: torch.Tensor, truth: torch.Tensor) -> None:
    """A wrong result is not timed."""
    ours, theirs = ((x.double() - truth).abs().max().item() for x in (got, peer))
    if not ours <= 2 * theirs + 3e-7 * truth.abs().max().item():
        raise SystemExit(f"{what}: error {ours:.3g} against float64, torch's {theirs:.3g}; not timed")


def ceilings(b: Bench) -> None:
    n = b.size(1 << 29)
    x, y = torch.randn(n, device=b.device), torch.empty(n, device=b.device)
    b.copy_rate = 8 * n / b.time(lambda: y.copy_(x))
    k = 256 if b.quick else 8192
    m1, m2 = (torch.randn(k, k, device=b.device, dtype=BF16) for _ in range(2))
    b.gemm_rate = 2 * k**3 / b.time(lambda: m1 @ m2)
    b.add({"op": "ceilings", "copy_gb_s": b.copy_rate / 1e9, "gemm_tflop_s": b.gemm_rate / 1e12})


def bench_adamw(b: Bench) -> None:
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
    for n, with_copy in ((b.size(128_000_000), False), (b.size(1_000_000_000), False), (b.size(1_000_000_000), True)):
        _check_adamw(b, options)
        _bench_adamw_of(b, n, with_copy, options)


def _bench_adamw_of(b: Bench, n: int, with_copy: bool, options: dict) -> None:
    """One size, in a function of its own: its tensors are freed before those of the next."""
    p, m, v = torch.randn(n, device=b.device), *(torch.zeros(n, device=b.device) for _ in range(2))
    g = (0.01 * torch.randn(n, device=b.device)).to(BF16 if with_copy else F32)
    step = torch.zeros((), device=b.device)
    copies = [torch.empty(n, device=b.device, dtype=BF16)] if with_copy else None
    calls = {
        f"fastft {name}": lambda name=name: adamw(
            [p], [g], [m], [v], [], [step], copies=copies, **options, backend=name
        )
        for name in ours_on(b.device, "adamw")
    }
    if not with_copy:
        calls |= _adamw_peers(p, g)
    b.contenders({"op": "adamw", "n": n, "bf16 gradient and copy": with_copy}, calls, floor_bytes=28 * n)


def _check_adamw(b: Bench, options: dict) -> None:
    start, grad = (torch.randn(10_007, device=b.device) for _ in range(2))
    results = []
    for dtype in (F32, torch.float64):
        p = torch.nn.Parameter(start.to(dtype, copy=True))
        p.grad = grad.to(dtype)
        torch.optim.AdamW([p], lr=options["lr"], weight_decay=0.01, foreach=False).step()
        results.append(p.detach())
    for name in ours_on(b.device, "adamw"):
        p, m, v, step = (
            start.clone(),
            torch.zeros_like(start),
            torch.zeros_like(start),
            torch.zeros((), device=b.device),
        )
        adamw([p], [grad], [m], [v], [], [step], **options, backend=name)
        check(f"adamw {name}", p, *results)


def _adamw_peers(param: torch.Tensor, grad: torch.Tensor) -> dict:
    """name -> one step of a peer on this parameter, made when it is first called: some peers fail at once."""

    def of(make):
        made = []

        def call():
            if not made:
                p = torch.nn.Parameter(param)
                p.grad = grad
                made.append(make([p]))
            made[0].step()

        return call

    peers = {
        "torch fused": of(lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True)),
        "torch foreach": of(lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True)),
    }
    if importable("apex"):
        peers["apex"] = of(lambda p: importlib.import_module("apex.optimizers").FusedAdam(p, lr=1e-3))
    if importable("transformer_engine"):
        peers["transformer_engine"] = of(
            lambda p: importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam(p, lr=1e-3)
        )
    if bnb := importable("bitsandbytes"):
        peers["bitsandbytes 8-bit"] = of(lambda p: bnb.optim.AdamW8bit(p, lr=1e-3))
    return peers


def bench_sum_squares(b: Bench) -> None:
    for dtype in (BF16, F32):
        x = torch.randn(b.size(1_000_000_000), device=b.device, dtype=dtype)
        small = x[:100_003]
        for name in ours_on(b.device, "sum_squares"):
            check(
                "sum_squares",
                sum_squares([small], backend=name),
                small.float().square().sum(),
                small.double().square().sum(),
            )
        calls = {
            f"fastft {name}": lambda name=name, x=x: sum_squares([x], backend=name)
            for name in ours_on(b.device, "sum_squares")
        }
        calls["torch foreach_norm"] = lambda x=x: torch._foreach_norm([x], 2, dtype=F32)
        b.contenders(
            {"op": "sum_squares", "n": x.numel(), "dtype": str(dtype)[6:]},
            calls,
            floor_bytes=x.numel() * x.element_size(),
        )


def bench_cross_entropy(b: Bench) -> None:
    compiled = torch.compile(F.cross_entropy)
    for rows, vocab in LOGITS:
        for dtype in (BF16, F32):
            rows, vocab = (min(rows, 3), min(vocab, 997)) if b.quick else (rows, vocab)
            logits = (3 * torch.randn(rows, vocab, device=b.device)).to(dtype).requires_grad_()
            target = torch.randint(vocab, (rows,), device=b.device)
            _check_cross_entropy(b, logits, target)

            def both(loss_of, logits=logits, target=target):
                return torch.autograd.grad(loss_of(logits, target), logits)

            def in_place(name, logits=logits, target=target):
                torch.autograd.grad(cross_entropy(logits.view_as(logits), target, inplace=True, backend=name), logits)

            calls = {
                f"fastft {name} in place": lambda name=name: in_place(name)
                for name in ours_on(b.device, "cross_entropy")
            }
            calls |= {
                f"fastft {name}": lambda name=name: both(lambda x, y: cross_entropy(x, y, backend=name))
                for name in ours_on(b.device, "cross_entropy")
            }
            calls |= {"torch": lambda: both(F.cross_entropy), "torch.compile": lambda: both(compiled)}
            if liger := importable("liger_kernel.transformers.functional"):
                calls["liger"] = lambda: both(lambda x, y: liger.liger_cross_entropy(x, y))
            if quack := importable("quack.cross_entropy"):
                calls["quack"] = lambda: both(lambda x, y: quack.cross_entropy(x, y).mean())
            size = logits.element_size() * logits.numel()
            b.contenders(
                {"op": "cross_entropy", "rows": rows, "vocab": vocab, "dtype": str(dtype)[6:]},
                calls,
                floor_bytes=2 * size,
            )
            del logits, calls


def _check_cross_entropy(b: Bench, logits: torch.Tensor, target: torch.Tensor) -> None:
    few, their_target = logits.detach()[:64], target[:64]
    truth, peer = few.double().requires_grad_(), few.clone().requires_grad_()
    F.cross_entropy(truth, their_target).backward()
    F.cross_entropy(peer, their_target).backward()
    for name in ours_on(b.device, "cross_entropy"):
        ours = few.clone().requires_grad_()
        cross_entropy(ours, their_target, backend=name).backward()
        check(f"cross_entropy {name}", ours.grad, peer.grad, truth.grad)


def bench_linear_cross_entropy(b: Bench) -> None:
    for rows, width, vocab in HEADS:
        rows, width, vocab = (13, 32, 997) if b.quick else (rows, width, vocab)
        case = {"op": "linear_cross_entropy", "rows": rows, "width": width, "vocab": vocab}
        try:
            _bench_head(b, case, rows, width, vocab)
        except (Exception, SystemExit) as error:
            b.failed(case, error)


def _bench_head(b: Bench, case: dict, rows: int, width: int, vocab: int) -> None:
    """One head, in a function of its own: its tensors are freed before those of the next."""
    hidden = torch.randn(rows, width, device=b.device, dtype=BF16).requires_grad_()
    weight = (torch.randn(vocab, width, device=b.device, dtype=BF16) / width**0.5).requires_grad_()
    target = torch.randint(vocab, (rows,), device=b.device)

    def both(loss_of):
        return torch.autograd.grad(loss_of(hidden, weight, target), (hidden, weight))

    def plain(h, w, y):
        return F.cross_entropy(F.linear(h, w), y)

    def ours(name, **options):
        return lambda: both(lambda h, w, y: linear_cross_entropy(h, w, y, backend=name, **options))

    names = ours_on(b.device, "linear_cross_entropy")
    _check_linear(hidden, weight, target, plain)
    calls = {f"fastft {name}": ours(name) for name in names}
    _check_whole_gradients(calls, lambda: both(plain))
    if b.plans:
        calls |= {f"fastft, {plan}": _with_plan(plan, calls[f"fastft {names[0]}"]) for plan in _plans(rows, width)}
        b.contenders(case, calls, flops=6.0 * rows * width * vocab, output_bytes=2 * width * (rows + vocab))
        return
    # What the plan of chunks passed over, of either kind: is its model right?
    calls["fastft, all rows at once"] = ours(names[0], chunk_bytes=2**62)
    calls["fastft, 1 GiB of logits"] = ours(names[0], chunk_bytes=2**30)
    calls["torch"] = lambda: both(plain)
    if hasattr(F, "linear_cross_entropy"):
        calls["torch linear_cross_entropy"] = lambda: both(F.linear_cross_entropy)
    if liger := importable("liger_kernel.transformers.functional"):
        calls["liger"] = lambda: both(lambda h, w, y: liger.liger_fused_linear_cross_entropy(h, w, y))
    if cce := importable("cut_cross_entropy"):
        calls["cut_cross_entropy"] = lambda: both(lambda h, w, y: cce.linear_cross_entropy(h, w, y))
    b.contenders(case, calls, flops=6.0 * rows * width * vocab, output_bytes=2 * width * (rows + vocab))


def _plans(rows: int, width: int) -> list[Plan]:
    sizes = [-(-rows // chunks // 128) * 128 for chunks in (1, 2, 3, 4, 5, 6, 8)]
    last = max(sizes[1], rows - width)
    return [Plan(size) for size in sizes] + ([Plan(last, parked=rows - last)] if last < rows else [])


def _with_plan(plan: Plan, call):
    def planned():
        with mock.patch.object(linear_cross_entropy_chunks, "_plan", lambda *_: plan):
            return call()

    return planned


def _check_linear(hidden, weight, target, plain) -> None:
    h, w, y = hidden.detach()[:32], weight.detach(), target[:32]
    found = []
    for dtype, loss_of in ((BF16, linear_cross_entropy), (BF16, plain), (torch.float64, plain)):
        leaf = h.to(dtype, copy=True).requires_grad_()
        loss_of(leaf, w.to(dtype), y).backward()
        found.append(leaf.grad)
    check("linear_cross_entropy", *found)


def _check_whole_gradients(calls: dict, plain) -> None:
    """All rows, divided as they will be timed: within bfloat16's noise of torch's own gradients."""
    expected = plain()
    for name, call in calls.items():
        for what, got, other in zip(("hidden", "weight"), call(), expected, strict=True):
            far = ((got.float() - other.float()).norm() / other.float().norm()).item()
            if not far <= 0.02:
                raise SystemExit(f"{name}: gradient of {what} is {far:.3g} of its size away from torch's; not timed")


PARTS = {
    "ceilings": ceilings,
    "adamw": bench_adamw,
    "sum_squares": bench_sum_squares,
    "cross_entropy": bench_cross_entropy,
    "linear_cross_entropy": bench_linear_cross_entropy,
}


def table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        if row["op"] == "ceilings":
            lines.append(f"copy {row['copy_gb_s']:.0f} GB/s, bf16 GEMM {row['gemm_tflop_s']:.0f} TFLOP/s")
            continue
        case = " ".join(
            f"{k}={v}"
            for k, v in row.items()
            if k in ("n", "rows", "width", "vocab", "dtype", "bf16 gradient and copy")
        )
        figures = (
            row.get("error")
            or f"{row['ms']:9.3f} ms  {row['x_ours']:6.2f} x ours  {row['of_ceiling']:5.0%} of ceiling  "
            f"{row['beyond_mib']:9.1f} MiB"
        )
        lines.append(f"{row['op']:<21}{case:<40}{row['contender']:<28}{figures}")
    return "\n".join(lines)


def short(rows: list[dict]) -> list[str]:
    """What failed, and where ours is further from the ceiling than its goal: a line each. Of our backends, the best."""
    found, best = [], {}
    for row in rows:
        case = " ".join(str(row[k]) for k in ("op", "n", "rows", "width", "vocab", "dtype") if k in row)
        who = row.get("contender", "")
        if "error" in row and (not who or who.startswith("fastft")):
            found.append(f"SHORT {case} {who}: {row['error']}")
        elif who.startswith("fastft") and "," not in who and row["op"] in GOALS:
            best[case, row["op"]] = max(best.get((case, row["op"]), 0.0), row["of_ceiling"])
    for (case, op), share in best.items():
        if share < GOALS[op]:
            found.append(f"SHORT {case}: {share:.0%} of the ceiling, the goal is {GOALS[op]:.0%}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--machine", help="how the record names the device")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plans", action="store_true", help="many divisions of linear_cross_entropy's rows")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where rows are appended")
    parser.add_argument("--quick", action="store_true", help="small sizes, nothing recorded: does it run?")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    torch.manual_seed(0)
    bench = Bench(args.device, args.quick, args.machine, args.out, args.plans)
    ceilings(bench)
    for name, part in PARTS.items():
        if name != "ceilings" and (not args.parts or name in args.parts):
            try:
                part(bench)
            except (Exception, SystemExit) as error:  # a wrong result ends its own part
                bench.failed({"op": name}, error)
    print(table(bench.rows))
    if found := short(bench.rows) if not args.quick else [line for line in short(bench.rows) if "goal" not in line]:
        print("\n".join(found))
        raise SystemExit(SHORT)


if __name__ == "__main__":
    main()
