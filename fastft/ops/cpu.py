"""What this CPU is good at, and what follows for bf16."""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

from fastft.ops import native


@functools.cache
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions for products of bf16 (AMX, avx512_bf16; on ARM those that oneDNN takes).

    oneDNN says yes on every AVX-512 CPU and converts where there are none; without AVX-512 torch's own loops multiply
    bf16 at a hundredth to a fifth of fp32's rate (measured on an AVX2 machine, torch 2.13).
    """
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    has = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    if platform.machine().lower() not in ("x86_64", "amd64") or has is None:
        return True
    return bool(has())


def widens(x: Tensor) -> bool:
    """Whether products of tensors like x are taken in float32: bf16 on a CPU that does not multiply it."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not cpu_multiplies_bf16()


def widened(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The tensors in float32, side by side in memory along their first dimension; None stays."""
    given = [t for t in tensors if t is not None]
    if not given:
        return tensors
    sizes = [t.shape[0] for t in given]
    whole = torch.empty(sum(sizes), *given[0].shape[1:], dtype=torch.float32)
    parts = iter([part.copy_(t) for part, t in zip(whole.split(sizes), given, strict=True)])
    return tuple(None if t is None else next(parts) for t in tensors)


def describe() -> str:
    """What this CPU has and which kernels it gets, for records: "AVX2, no bf16 instructions; kernels for avx2"."""
    has = "" if cpu_multiplies_bf16() else "no "
    try:
        kernels = f"kernels for {native.module().cpu_path()}"
    except ImportError as error:
        kernels = f"no kernels (fastft._C is {error})"
    return f"{torch.backends.cpu.get_cpu_capability()}, {has}bf16 instructions; {kernels}"
