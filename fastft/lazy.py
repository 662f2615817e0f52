"""torch, imported when it is first used: a configuration is checked in a fraction of the time that importing torch
takes.

Files whose settings stand beside code that needs torch (tasks, optimizers, ...) write ``from fastft.lazy import
torch`` and ``from __future__ import annotations``; tests/test_floors.py holds them to it.
"""

from typing import TYPE_CHECKING

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
