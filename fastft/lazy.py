"""torch, imported when it is first used: a configuration is checked in a fraction of the time that importing torch
takes.

Files whose settings stand beside code that needs torch (tasks, optimizers, ...) write ``from fastft.lazy import
torch`` and ``from __future__ import annotations``; tests/test_floors.py holds them to it.
"""

import os
from typing import TYPE_CHECKING


def before_imports() -> None:
    """What torch, transformers and the hub's client read from the environment when they are imported; what is set
    there stays.

    The spin count: OpenMP threads that wait in a busy loop take the core from the thread they wait for when something
    else runs too (30 times slower, seen on 2 busy cores).
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


if TYPE_CHECKING:
    import torch as torch
else:
    import importlib
    from types import ModuleType

    class _Lazy(ModuleType):
        def __getattr__(self, name: str):
            value = getattr(importlib.import_module(self.__name__), name)
            setattr(self, name, value)
            return value

    torch = _Lazy("torch")
