"""What a parameter grouping is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from fastft.config import Config, Section
from fastft.lazy import torch


@dataclass(frozen=True)
class Progress:
    """How far a run is: ``step`` done of ``total``, and epochs done."""

    step: int
    total: int
    epoch: float


class Grouping(ABC):
    """A rule over all trained parameters: each gets a key, and each key a factor of the learning rate.

    Every parameter is in the optimizer from the start, also where its factor is 0: a parameter whose ``requires_grad``
    is set after DeepSpeed's engine was built never moves.
    """

    Settings: ClassVar[type[Section]] = Section

    def __init__(self, settings: Any, model: torch.nn.Module, config: Config):
        self.settings, self.config = settings, config

    @abstractmethod
    def key(self, name: str, parameter: torch.nn.Parameter) -> str:
        """Which of this rule's groups a parameter belongs to."""

    @abstractmethod
    def lr_scale(self, key: str, progress: Progress) -> float:
        """Factor of the learning rate of a group, for the step after ``progress``."""
