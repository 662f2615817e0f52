"""What an objective is, and what a wrapper around one is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from fastft.config import Config, Section
from fastft.lazy import torch

if TYPE_CHECKING:
    from fastft.tasks.base import Batch


class Objective(ABC):
    """How the loss of a batch is taken.

    Attributes
    ----------
    record : dict
        What was settled, for the run's record, as JSON.
    """

    record: dict[str, Any] = {}

    def begin_step(self, model: Callable, batches: list[Batch]) -> list[Batch]:
        """Once an optimizer step, before its micro-steps, equally often on all ranks; the batches to take instead."""
        return batches

    @abstractmethod
    def compute_loss(self, model: Callable, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        """Sum of the batch's losses times ``scale`` (0-dim float32 on the batch's device): a scalar to call backward
        on.

        ``model`` is the Hugging Face model, or the DeepSpeed engine around it.
        """


class OutputsObjective(Objective):
    """A loss of the model's outputs."""

    def __init__(self, loss: Callable[[Any, Batch, torch.Tensor], torch.Tensor]):
        self.loss = loss

    def compute_loss(self, model: Callable, batch: Batch, scale: torch.Tensor) -> torch.Tensor:
        return self.loss(model(**batch.inputs), batch, scale)


class Wrapper(Objective):
    """An objective around another, chosen by a key of ``loss``.

    Class attributes
    ----------------
    Settings : Section type
        What stands under that key.
    """

    Settings: ClassVar[type[Section]] = Section

    def __init__(self, inner: Objective, settings: Any, config: Config):
        self.inner, self.settings, self.config = inner, settings, config
        self.record = inner.record

    def begin_step(self, model: Callable, batches: list[Batch]) -> list[Batch]:
        return self.inner.begin_step(model, batches)
