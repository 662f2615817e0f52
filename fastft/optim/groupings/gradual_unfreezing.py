"""Gradual unfreezing: first the head alone, then one more layer at a time, from the top."""

from __future__ import annotations

import logging
import math
from typing import Any, ClassVar

from pydantic import Field, field_validator

from fastft import rooms
from fastft.config import Config, Section
from fastft.config.every import Every, interval
from fastft.lazy import torch
from fastft.models.depth import depths
from fastft.optim.groupings.base import Grouping, Progress

log = logging.getLogger(__name__)


class GradualUnfreezingSettings(Section):
    """When the next layer is trained too."""

    scalar: ClassVar = "every"

    every: Every = Field(
        description="Train one more layer after every N steps (200) or epochs (epoch, 0.5 epochs); the head is trained "
        "from the first step, the embeddings come last."
    )

    @field_validator("every")
    @classmethod
    def _no_clock(cls, value: int | str) -> int | str:
        if interval(value).seconds is not None:
            raise ValueError(
                f"{value}: a time would make the weights depend on the machine's speed: give steps or epochs"
            )
        return value


@rooms.GROUPINGS.register("gradual_unfreezing")
class GradualUnfreezing(Grouping):
    """Layers that are not trained yet have a learning rate of 0 (ULMFiT: Howard and Ruder 2018, section 3.3).

    They are in the optimizer all the same: their gradients count in the global norm that is clipped, and go into its
    moments, so that a layer whose turn has come starts with warm ones. An update by a learning rate of 0 is exactly 0,
    weight decay included.
    """

    Settings = GradualUnfreezingSettings

    def __init__(self, settings: Any, model: torch.nn.Module, config: Config):
        super().__init__(settings, model, config)
        self.depths = depths(model)
        self.told = False

    def key(self, name: str, parameter: torch.nn.Parameter) -> str:
        return str(self.depths.of[name])

    def lr_scale(self, key: str, progress: Progress) -> float:
        self._tell(progress)
        return float(self.depths.top - int(key) <= self.opened(progress.step, progress.epoch))

    def opened(self, step: int, epoch: float) -> int:
        """How many layers below the head are trained in the step after ``step``."""
        every = interval(self.settings.every)
        if every.steps is not None:
            return step // every.steps
        assert every.epochs is not None
        return math.floor(epoch / every.epochs + 1e-9)

    def _tell(self, progress: Progress) -> None:
        """Say it once when the run ends before the last layer's turn."""
        if self.told or progress.step == 0:  # how many epochs there are is known from the first step on
            return
        self.told = True
        last = progress.total - 1
        opened = self.opened(last, progress.epoch * last / progress.step)
        lowest = self.depths.top - min(self.depths.of.values())
        if opened < lowest:
            log.warning(
                "optim.gradual_unfreezing: every %s: the run of %d steps ends before the lowest %d of %d groups of "
                "layers are trained; they stay as they are",
                self.settings.every,
                progress.total,
                lowest - opened,
                lowest + 1,
            )
