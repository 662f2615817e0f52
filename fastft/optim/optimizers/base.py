"""What an optimizer is to the configuration and to the engine around it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Protocol

from fastft import rooms
from fastft.config import Config, Optim
from fastft.lazy import torch


class ClientOptimizer(Protocol):
    """A torch optimizer that DeepSpeed can be built around. One with ``step_flat`` gets the fused ZeRO step."""

    param_groups: list[dict[str, Any]]
    state: Any

    def step(self, closure: Any = None) -> Any: ...

    def steps_suspended(self) -> AbstractContextManager:
        """While inside, step() changes nothing: DeepSpeed calls it on zero gradients while it is built."""

    def scaled(
        self, grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
    ) -> AbstractContextManager:
        """While inside, step() multiplies gradients by ``grad_scale`` (0-dim) and changes nothing where ``found_inf``
        is not 0.
        """


class OptimizerSpec(ABC):
    """One optimizer: the settings that it adds to ``optim``, and how it is made.

    Class attributes
    ----------------
    Settings : Optim type
    state_tensors : tuple of str
        Names of its state that is as large as the parameter.
    elementwise : bool
        Whether a parameter's elements are updated on their own, so that ZeRO may cut it anywhere, and a run may resume
        with other ranks or another ZeRO stage.
    replaces_masters : bool
        Whether bf16 weights are updated without fp32 copies.
    """

    Settings: ClassVar[type[Optim]] = Optim
    state_tensors: tuple[str, ...] = ()
    elementwise: bool = True
    replaces_masters: bool = False

    def __init__(self, settings: Any, config: Config):
        self.settings, self.config = settings, config

    @staticmethod
    def of(config: Config) -> OptimizerSpec:
        """The one that the configuration names."""
        return rooms.OPTIMIZERS.get(config.optim.name)(config.optim, config)

    @abstractmethod
    def build(self, groups: list[dict[str, Any]]) -> ClientOptimizer:
        """Over parameter groups that say their ``weight_decay`` themselves."""


def as_client(cls: type[torch.optim.Optimizer]) -> type:
    """A torch optimizer's class as a ClientOptimizer."""

    class Client(cls):  # type: ignore[misc, valid-type]
        suspended = False
        scaling: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)

        def step(self, closure: Any = None) -> Any:
            if self.suspended:
                return closure() if closure is not None else None
            grad_scale, found_inf = self.scaling
            if found_inf is not None and bool(found_inf):
                return None
            if grad_scale is not None:
                grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
                torch._foreach_mul_(grads, grad_scale)
            return super().step(closure)

        @contextmanager
        def steps_suspended(self) -> Iterator[None]:
            self.suspended = True
            try:
                yield
            finally:
                self.suspended = False

        @contextmanager
        def scaled(
            self, grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
        ) -> Iterator[None]:
            self.scaling = grad_scale, found_inf
            try:
                yield
            finally:
                self.scaling = None, None

    Client.__name__ = Client.__qualname__ = cls.__name__
    return Client
