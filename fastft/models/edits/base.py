"""What a model edit is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from fastft.config import Config, Section
from fastft.lazy import torch


class Edit(ABC):
    """A change of the model, chosen by a key of ``model``.

    Class attributes
    ----------------
    Settings : Section type
    order : int
        Smaller ones are applied first: 0 what replaces weights (quantization), 50 what replaces modules, 100 what is
        put around them (adapters).
    """

    Settings: ClassVar[type[Section]] = Section
    order: ClassVar[int] = 100

    def __init__(self, settings: Any, config: Config):
        self.settings, self.config = settings, config

    @abstractmethod
    def apply(self, model: torch.nn.Module) -> None:
        """Change the model in place. Raises UserError when it cannot be done to this one."""

    def owns(self, name: str) -> bool:
        """Whether a parameter of the edited model is the edit's own."""
        return False

    @property
    def freezes_base(self) -> bool:
        """Whether only this edit's parameters are trained, and only they belong in checkpoints."""
        return False

    def export(self, state: dict[str, torch.Tensor], model: torch.nn.Module, folder: Path, dtype: torch.dtype) -> bool:
        """Write the edited model in a form of its own; False: it has none, and the whole model is saved.

        ``state``: the edited model's, by its parameters' names.
        """
        return False

    def after_training(self, model: torch.nn.Module) -> None:
        """Called once training is over, on every rank. Raises UserError when the edit learned nothing."""

    def record(self) -> dict[str, Any]:
        """What was done, for the run's record, as JSON."""
        return {}
