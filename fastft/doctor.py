"""What this machine has, which backend each op would use here, and whether each backend computes what it should.

The self-check compares every op on every backend that loads with torch's own result in float64, through the same table
that training uses; a kernel that was built for another machine or miscompiled shows here rather than in a loss curve.
"""

import os
import platform
from importlib import metadata
from json import dumps

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import fastft
from fastft.ops import adamw, backends, cross_entropy, linear_cross_entropy, native, sum_squares

PACKAGES = ("torch", "transformers", "deepspeed", "triton", "datasets", "peft", "safetensors", "numpy")
DTYPES = (torch.float32, torch.bfloat16)
# Largest error over largest true value. bfloat16: one unit in the last place, which also lets truncation pass.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1 / 128}


def report() -> dict:
    """Everything `main` prints, as plain values.

    versions    package -> version, or "not installed"
    native      built (bool), and reason, or build_info, cpu_features, cpu_path
    machine     CPU cores, torch threads, CUDA devices
    backends    one row per op, device and dtype: picked, passed_over, and unavailable (backend -> reason)
    self_check  one row per op, backend, device and dtype: error, tolerance, passed, and problem (a message, or "")
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return {
        "versions": _versions(),
        "native": _native(),
        "machine": {
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "backends": [
            _choice(op, device, dtype) for op in backends.ops() for device in ("cpu", "cuda") for dtype in DTYPES
        ],
        "self_check": [
            _checked(op, backend, device, dtype)
            for op in CHECKS
            for backend in backends.names(op)
            for device in devices
            for dtype in DTYPES
            if not backends.why_not(op, backend, device, _dtypes(op, dtype))
        ],
    }


def main(json: bool = False) -> int:
    """Print the report, as JSON or as tables. Returns the exit code: 1 when a self-check failed."""
    found = report()
    if json:
        print(dumps(found, indent=2))
    else:
        _print_tables(found, Console())
    return 0 if all(row["passed"] for row in found["self_check"]) else 1


def _versions() -> dict[str, str]:
    versions = {"fastft": fastft.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _native() -> dict:
    try:
        module = native.module()
    except ImportError as error:
        return {"built": False, "reason": str(error)}
    return {
        "built": True,
        "build_info": module.build_info(),
        "cpu_features": module.cpu_features(),
        "cpu_path": module.cpu_path(),
    }


def _dtypes(op: str, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    return (dtype, dtype) if op == "adamw" else (dtype,)


def _choice(op: str, device: str, dtype: torch.dtype) -> dict:
    dtypes = _dtypes(op, dtype)
    picked, passed_over = backends.preview(op, device, dtypes)
    reasons = {name: backends.why_not(op, name, device, dtypes) for name in backends.names(op)}
    return {
        "op": op,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "picked": picked,
        "passed_over": passed_over,
        "unavailable": {name: reason for name, reason in reasons.items() if reason},
    }


def _checked(op: str, backend: str, device: str, dtype: torch.dtype) -> dict:
    row = {"op": op, "backend": backend, "device": device, "dtype": str(dtype).removeprefix("torch."), "problem": ""}
    try:
        error = CHECKS[op](backend, device, dtype)
    except (
        RuntimeError,
        ValueError,
        IndexError,
    ) as problem:  # a kernel that cannot run is a finding, not the end of the report
        return {**row, "error": None, "tolerance": TOLERANCE[dtype], "passed": False, "problem": str(problem)}
    return {
        **row,
        "error": error,
        "tolerance": TOLERANCE[dtype],
        "passed": error <= TOLERANCE[dtype],
    }  # nan does not pass


def _relative(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest error of (ours, truth) over the largest true value, worst pair; nan when any of ours is nan."""
    errors = [(ours.double() - truth.double()).abs().max() / truth.double().abs().max() for ours, truth in pairs]
    return torch.stack(errors).max().item()


def _check_cross_entropy(backend: str, device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(1)
    logits = (3 * torch.randn(9, 1003, generator=generator)).to(device, dtype)
    target = torch.randint(0, 1003, (9,), generator=generator).to(device)
    target[4] = -100
    weight = (torch.rand(1003, generator=generator) + 0.5).to(device)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss = cross_entropy(ours, target, weight=weight, label_smoothing=0.1, backend=backend)
    true_loss = F.cross_entropy(truth, target, weight=weight.double(), label_smoothing=0.1)
    loss.backward()
    true_loss.backward()
    rows = cross_entropy(logits, target, reduction="none", backend=backend)
    true_rows = F.cross_entropy(logits.double(), target, reduction="none")
    return _relative([(loss.detach(), true_loss.detach()), (ours.grad, truth.grad), (rows, true_rows)])


def _check_linear_cross_entropy(backend: str, device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(4)
    tensors = [
        scale * torch.randn(shape, generator=generator)
        for scale, shape in ((1.0, (23, 31)), (0.3, (503, 31)), (1.0, (503,)))
    ]
    ours = [t.to(device, dtype).requires_grad_() for t in tensors]  # hidden, weight, bias
    truth = [t.detach().double().requires_grad_() for t in ours]
    target = torch.randint(0, 503, (23,), generator=generator).to(device)
    target[[4, 11]] = -100
    # Chunks of five rows. Summed, so that the loss is large and its error, which is that of rounded logits, relatively
    # small.
    options = {"label_smoothing": 0.1, "reduction": "sum"}
    loss = linear_cross_entropy(
        *ours[:2], target, bias=ours[2], chunk_bytes=5 * 503 * dtype.itemsize, backend=backend, **options
    )
    true_loss = F.cross_entropy(F.linear(*truth), target, **options)
    pairs = zip(torch.autograd.grad(loss, ours), torch.autograd.grad(true_loss, truth), strict=True)
    errors = [_relative([pair]) for pair in pairs]
    # bfloat16 rounds the logits as well as the result, a unit each.
    return max(
        _relative([(loss.detach(), true_loss.detach())]),
        *(e / (4 if dtype == torch.bfloat16 else 1) for e in errors),
        key=lambda x: (x != x, x),
    )


def _check_scale(backend: str, device: str, dtype: torch.dtype) -> float:
    grad = torch.randn(5, 1003, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    factor = torch.tensor(0.3, device=device)
    truth = grad.double() * factor.double()
    apart, in_place = torch.empty_like(grad), grad.clone()
    backends.implementation("scale", backend)(grad, factor, apart)
    backends.implementation("scale", backend)(in_place, factor, in_place)
    return _relative([(apart, truth), (in_place, truth)])


def _check_adamw(backend: str, device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(3)
    param = torch.randn(1003, generator=generator).to(device, dtype)
    true_param = torch.nn.Parameter(param.double())
    optimizer = torch.optim.AdamW([true_param], lr=1e-2, weight_decay=0.1, foreach=False)
    m, v, step = (torch.zeros(shape, device=device) for shape in ((1003,), (1003,), ()))
    copy = torch.empty(1003, device=device, dtype=torch.bfloat16)
    for i in range(3):
        grad = torch.randn(1003, generator=generator).to(device, dtype)
        adamw(
            [param],
            [grad],
            [m],
            [v],
            [],
            [step],
            copies=[copy],
            lr=1e-2,
            beta1=0.9,
            beta2=0.999,
            eps=1e-8,
            weight_decay=0.1,
            backend=backend,
        )
        true_param.grad = grad.double()
        optimizer.step()
        if dtype == torch.bfloat16 and i < 2:  # what bfloat16 rounds away in between is no error of this step
            true_param.data = param.double()
    state = optimizer.state[true_param]
    # Held to the dtype's tolerance times its own scale: the copy is bfloat16 also beside float32 params.
    copy_error = _relative([(copy, true_param.detach())]) * TOLERANCE[dtype] / TOLERANCE[torch.bfloat16]
    error = _relative([(param, true_param.detach()), (m, state["exp_avg"]), (v, state["exp_avg_sq"])])
    return max(error, copy_error, abs(step.item() - 3), key=lambda x: (x != x, x))


def _check_sum_squares(backend: str, device: str, dtype: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(4)
    tensors = [torch.randn(n, generator=generator).to(device, dtype) for n in (1, 1003, 70001)]
    truth = torch.stack([t.double().square().sum() for t in tensors]).sum()
    return _relative([(sum_squares(tensors, backend=backend), truth)])


CHECKS = {
    "cross_entropy": _check_cross_entropy,
    "linear_cross_entropy": _check_linear_cross_entropy,
    "scale": _check_scale,
    "adamw": _check_adamw,
    "sum_squares": _check_sum_squares,
}


def _print_tables(found: dict, console: Console) -> None:
    versions = Table("package", "version", title="Versions")
    for package, version in found["versions"].items():
        versions.add_row(package, version)
    console.print(versions)

    module = found["native"]
    if module["built"]:
        build = module["build_info"]
        cuda = "CUDA for " + ", ".join(build["cuda_archs"]) if build["cuda"] else "no CUDA"
        console.print(f"Native module: {build['compiler']}, {cuda}; CPU path {module['cpu_path']}")
        console.print("CPU has: " + ", ".join(name for name, has in module["cpu_features"].items() if has))
    else:
        console.print(f"Native module: {module['reason']}")
    devices = ", ".join(found["machine"]["cuda_devices"]) or "no CUDA device"
    console.print(f"{found['machine']['cores']} cores, {found['machine']['torch_threads']} torch threads; {devices}")

    choices = Table("op", "device", "dtype", "picked", "not available", title="Backends")
    for row in found["backends"]:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in row["unavailable"].items())
        choices.add_row(row["op"], row["device"], row["dtype"], row["picked"], reasons)
    console.print(choices)

    checks = Table("op", "backend", "device", "dtype", "error", "allowed", "result", title="Self-check against float64")
    for row in found["self_check"]:
        error = row["problem"] if row["error"] is None else f"{row['error']:.2g}"
        result = "[green]pass[/green]" if row["passed"] else "[bold red]FAIL[/bold red]"
        checks.add_row(row["op"], row["backend"], row["device"], row["dtype"], error, f"{row['tolerance']:.2g}", result)
    console.print(checks)
