"""Layer-wise learning-rate decay: the lower the layer, the smaller its learning rate."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fastft import rooms
from fastft.config import Config, Section
from fastft.lazy import torch
from fastft.models.depth import depths
from fastft.optim.groupings.base import Grouping, Progress


class LayerDecaySettings(Section):
    """The factor from one layer to the next lower one."""

    scalar: ClassVar = "rate"

    rate: float = Field(gt=0, le=1, description="Factor of the learning rate from a layer to the one below it.")


@rooms.GROUPINGS.register("layer_decay")
class LayerDecay(Grouping):
    """The head has the whole learning rate, the top layer ``rate`` times it, the one below rate^2, embeddings least.

    As ELECTRA (Clark et al. 2020) and BEiT (Bao et al. 2021) are fine-tuned.
    """

    Settings = LayerDecaySettings

    def __init__(self, settings: Any, model: torch.nn.Module, config: Config):
        super().__init__(settings, model, config)
        self.depths = depths(model)

    def key(self, name: str, parameter: torch.nn.Parameter) -> str:
        return str(self.depths.of[name])

    def lr_scale(self, key: str, progress: Progress) -> float:
        return self.settings.rate ** (self.depths.top - int(key))
