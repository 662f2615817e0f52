"""A small self-check of every op on every backend, against float64: the numbers of `fastft doctor`.

One file per op, of the op's name, found by listing this folder. Each has

    check(backend, device, dtype) -> float     largest error over the largest true value; nan when anything is nan
    dtypes(dtype) -> tuple of dtypes           optional: those by which the op chooses its backend; default (dtype,)

A check runs the op as training does, through `fastft.ops`, and compares with torch's own result in float64.
"""

import functools
import pkgutil
from collections.abc import Callable, Iterable
from importlib import import_module

import torch

# Largest error over largest true value. bfloat16: one unit in the last place, which also lets truncation pass.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1 / 128}

Check = Callable[[str, str, torch.dtype], float]  # backend, device, dtype -> error


@functools.cache
def checks() -> dict[str, Check]:
    """op -> its self-check."""
    return {op: import_module(f"{__name__}.{op}").check for op in _ops()}


def dtypes(op: str, dtype: torch.dtype) -> tuple[torch.dtype, ...]:
    """The dtypes by which an op chooses its backend, where all its tensors have this one."""
    if op not in _ops():
        return (dtype,)
    of_call = getattr(import_module(f"{__name__}.{op}"), "dtypes", lambda dtype: (dtype,))
    return of_call(dtype)


def relative(pairs: list[tuple[torch.Tensor | None, torch.Tensor | None]]) -> float:
    """Largest error of (ours, truth) over the largest true value, worst pair; nan when any of ours is nan."""
    return worst(_relative(ours, truth) for ours, truth in pairs)


def worst(errors: Iterable[float]) -> float:
    """The largest, where nan is larger than any number."""
    return max(errors, key=lambda error: (error != error, error))


def _relative(ours: torch.Tensor | None, truth: torch.Tensor | None) -> float:
    assert ours is not None and truth is not None  # a gradient that was not computed
    return ((ours.double() - truth.double()).abs().max() / truth.double().abs().max()).item()


@functools.cache
def _ops() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))
