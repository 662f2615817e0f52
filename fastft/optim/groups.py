"""Parameter groups, and the learning rate of each."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastft import rooms
from fastft.config import Config, Optim
from fastft.optim.groupings.base import Grouping, Progress
from fastft.optim.schedules import learning_rate
from fastft.zero.parameters import whole_shape


class ParameterGroups:
    """Trainable parameters in named groups: matrices get weight decay; biases, norms and other vectors do not. Each of
    ``optim``'s groupings divides them further.

    Attributes
    ----------
    groups : list of dict
        ``name``, ``params``, ``weight_decay``, as torch's optimizers take them; none is empty.
    """

    def __init__(self, model: torch.nn.Module, settings: Optim, groupings: list[Grouping]):
        self.settings, self.groupings = settings, groupings
        found: dict[tuple[str, ...], list[torch.nn.Parameter]] = {}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for kind, matrices in (("decay", True), ("no_decay", False)):
            for name, p in trained:
                if (len(whole_shape(p)) >= 2) == matrices:
                    found.setdefault((kind, *(rule.key(name, p) for rule in groupings)), []).append(p)
        self.keys = list(found)
        self.groups: list[dict[str, Any]] = [
            {
                "name": "/".join(key),
                "params": params,
                "weight_decay": settings.weight_decay if key[0] == "decay" else 0.0,
            }
            for key, params in found.items()
        ]

    @classmethod
    def of(cls, model: torch.nn.Module, config: Config) -> ParameterGroups:
        """Those that the configuration asks for. Raises UserError where a grouping cannot be had for this model."""
        chosen = config.optim.chosen().items()
        return cls(
            model, config.optim, [rooms.GROUPINGS.get(name)(settings, model, config) for name, settings in chosen]
        )

    def set_learning_rates(self, optimizer: Any, progress: Progress) -> float:
        """Give every group its learning rate of the next step; returns the schedule's own."""
        lr = learning_rate(self.settings, progress.step, progress.total)
        for key, group in zip(self.keys, optimizer.param_groups, strict=True):
            scales = (rule.lr_scale(part, progress) for rule, part in zip(self.groupings, key[1:], strict=True))
            group["lr"] = lr * math.prod(scales) if self.groupings else lr
        return lr
