"""Triton kernels, and the only place that imports triton.

TRITON_INTERPRET=1, set before the first import, runs them on CPU tensors.
"""

import functools
import importlib
from collections.abc import Callable

import torch

DTYPES = (torch.float32, torch.bfloat16)


def require():
    """The triton package. ImportError naming the extra when it is missing."""
    try:
        import triton
    except ImportError as error:
        raise ImportError(f"{error}; install it with: pip install 'fastft[triton]'") from error
    return triton


def loader(module: str, function: str) -> Callable[[], Callable]:
    """For the table: a function that imports a file of this folder and returns its `function`, or an ImportError."""
    return lambda: getattr(importlib.import_module(f"fastft.ops.triton.{module}"), function)


@functools.cache
def interpreted() -> bool:
    """Whether kernels run in the interpreter.

    Triton decides when a kernel is defined, so the answer may not change later.
    """
    return bool(require().knobs.runtime.interpret)


def refuses(device_type: str, dtypes: tuple[torch.dtype, ...]) -> str:
    """Why the Triton kernels cannot do this; "" when they can."""
    if device_type == "cpu" and not interpreted():
        return "Triton runs on CPU tensors only in its interpreter, with TRITON_INTERPRET=1 set before the first import"
    if device_type not in ("cpu", "cuda"):
        return f"no kernels for {device_type}"
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"takes float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return ""
