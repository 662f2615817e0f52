"""Stochastic gradient descent, with or without momentum."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from fastft import rooms
from fastft.config import Config, Optim
from fastft.lazy import torch
from fastft.optim.optimizers.base import ClientOptimizer, OptimizerSpec, as_client


class SGDSettings(Optim):
    """torch.optim.SGD's. ``weight_decay`` is L2: it is added to the gradient, after clipping."""

    momentum: float = Field(0.0, ge=0, lt=1, description="Momentum; 0 keeps no state.")
    dampening: float = Field(
        0.0, ge=0, lt=1, description="How much less than all of a gradient goes into the momentum."
    )
    nesterov: bool = Field(False, description="Nesterov's momentum (Sutskever et al. 2013).")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("optim.nesterov needs optim.momentum above 0 and optim.dampening 0")
        if self.dampening and self.momentum == 0:
            raise ValueError("optim.dampening is of the momentum: set optim.momentum, or remove it")
        return self


@rooms.OPTIMIZERS.register("sgd")
class SGDSpec(OptimizerSpec):
    """SGD with momentum, dampening and Nesterov's variant; under ZeRO 1 to 3 in DeepSpeed's own step."""

    Settings = SGDSettings

    def __init__(self, settings: Any, config: Config):
        super().__init__(settings, config)
        self.state_tensors = ("momentum_buffer",) if settings.momentum else ()

    def build(self, groups: list[dict[str, Any]]) -> ClientOptimizer:
        s = self.settings
        return as_client(torch.optim.SGD)(
            groups,
            lr=s.lr,
            momentum=s.momentum,
            dampening=s.dampening,
            nesterov=s.nesterov,
            weight_decay=s.weight_decay,
        )
