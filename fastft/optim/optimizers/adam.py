"""Adam with L2 regularization through fastft's own kernels."""

from __future__ import annotations

from fastft import rooms
from fastft.optim.optimizers.fused_adamw import FusedAdamWSettings, FusedAdamWSpec


class AdamSettings(FusedAdamWSettings):
    """Adam: Kingma and Ba, arXiv 1412.6980. ``weight_decay`` is L2: added to the clipped gradient, in both moments."""


@rooms.OPTIMIZERS.register("adam")
class AdamSpec(FusedAdamWSpec):
    """Adam with L2 regularization, in one pass over memory; what torch.optim.Adam computes."""

    Settings = AdamSettings
    decoupled = False
