"""What this machine has, which backend each op would use here, and whether each backend computes what it should.

The self-check compares every op on every backend that loads with torch's own result in float64, through the same table
that training uses; a kernel that was built for another machine or miscompiled shows here rather than in a loss curve.
"""

import os
import platform
from importlib import metadata
from json import dumps

import torch
from rich.console import Console
from rich.markup import escape

import fastft
from fastft import terminal
from fastft.ops import backends, native, selfcheck
from fastft.ops.selfcheck import TOLERANCE
from fastft.streams import results_only

PACKAGES = ("torch", "transformers", "deepspeed", "triton", "datasets", "peft", "safetensors", "numpy")
DTYPES = (torch.float32, torch.bfloat16)
CHECKS = selfcheck.checks()  # op -> its self-check


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
            for op in backends.ops()
            if op in CHECKS
            for backend in backends.names(op)
            for device in devices
            for dtype in DTYPES
            if not backends.why_not(op, backend, device, selfcheck.dtypes(op, dtype))
        ],
    }


def main(json: bool = False) -> int:
    """Print the report, as JSON or as tables. Returns the exit code: 1 when a self-check failed."""
    with results_only():
        found = report()
    if json:
        print(dumps(found, indent=2))
    else:
        _print_tables(found, terminal.console())
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


def _choice(op: str, device: str, dtype: torch.dtype) -> dict:
    dtypes = selfcheck.dtypes(op, dtype)
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
    except (RuntimeError, ValueError, IndexError) as problem:  # is a finding, not the end of the report
        return {**row, "error": None, "tolerance": TOLERANCE[dtype], "passed": False, "problem": str(problem)}
    passed = error <= TOLERANCE[dtype]  # nan does not pass
    return {**row, "error": error, "tolerance": TOLERANCE[dtype], "passed": passed}


def _print_tables(found: dict, console: Console) -> None:
    terminal.print_table(console, ("package", "version"), list(found["versions"].items()), title="Versions")

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

    choices = []
    for row in found["backends"]:
        reasons = escape("\n".join(f"{name}: {reason}" for name, reason in row["unavailable"].items()))
        choices.append([row["op"], row["device"], row["dtype"], row["picked"], reasons])
    columns = ("op", "device", "dtype", "picked", "not available")
    terminal.print_table(console, columns, choices, title="Backends", text=("not available",))

    checks = []
    for row in found["self_check"]:
        error = escape(row["problem"]) if row["error"] is None else f"{row['error']:.2g}"
        result = "[green]pass[/green]" if row["passed"] else "[bold red]FAIL[/bold red]"
        allowed = f"{row['tolerance']:.2g}"
        checks.append([row["op"], row["backend"], row["device"], row["dtype"], error, allowed, result])
    names = ("op", "backend", "device", "dtype", "error", "allowed", "result")
    terminal.print_table(console, names, checks, title="Self-check against float64", text=("error",))
