"""An attention implementation of transformers that a model takes forward by forward, once it is proven on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastft.errors import UserError
from fastft.models.trial import REFUSALS


class Switch:
    """A model whose attention is ``name`` in the forwards that ask for it, and its own in all others.

    Attributes
    ----------
    on : bool
        False: every forward runs as without it.
    now : bool
        Whether the model's attention is ``name`` at this moment.
    """

    def __init__(self, model: nn.Module, name: str, attend: Callable):
        import transformers

        transformers.AttentionInterface.register(name, attend)
        self.name, self.on, self.now = name, True, False
        found: dict[int, Any] = {
            id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None
        }
        self.configs = [c for c in found.values() if getattr(c, "_attn_implementation", None) is not None]
        self.plain = [config._attn_implementation for config in self.configs]
        self.hooks: list[Any] = []

    def remove(self) -> None:
        self.take(False)
        for hook in self.hooks:
            hook.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """While inside, every forward runs as without it."""
        self.on = False
        try:
            yield
        finally:
            self.on = True

    def take(self, now: bool) -> None:
        """For this forward. Not back after it: activation checkpointing runs layers again in the backward."""
        if now != self.now:
            self.now = now
            for config, plain in zip(self.configs, self.plain, strict=True):
                config._attn_implementation = self.name if now else plain


def proven(installed: Switch, difference: Callable[[], float], dtype: torch.dtype, than: str) -> str:
    """Why the model is not the same with it, which is removed then; "" where it is.

    Parameters
    ----------
    difference : callable
        Runs the model both ways: the largest difference of logits, relative to the largest one.
    dtype : torch.dtype
        Of the model: how large it may be.
    than : str
        What the other way is called.
    """
    try:
        found = difference()
    except REFUSALS as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    else:
        allowed = 1e-4 if dtype == torch.float32 else 5e-2
        if found <= allowed:
            return ""
        reason = f"logits differ from those of {than} by {found:.2g} (allowed {allowed:.0e})"
    installed.remove()
    return reason


def refuse(model: nn.Module, choice: str, reason: str) -> None:
    """UserError where model.attention asks for what cannot be had."""
    if choice == "varlen":
        raise UserError(
            f"model.attention: varlen cannot be used for {type(model).__name__}: {reason}.",
            "Set model.attention: auto or sdpa.",
        )
