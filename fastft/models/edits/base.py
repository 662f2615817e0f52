"""What a model edit is."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fastft.config import Config, Section
from fastft.lazy import torch

if TYPE_CHECKING:
    from fastft.assemble import Job

State = Mapping[str, "torch.Tensor"]


class Lazy(Mapping[str, "torch.Tensor"]):
    """Weights by name, each made when it is asked for: nobody holds more than one."""

    def __init__(self, makers: Mapping[str, Callable[[], torch.Tensor]]):
        self.makers = makers

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)

    @staticmethod
    def taken(state: State, names: Mapping[str, str]) -> dict[str, Callable[[], torch.Tensor]]:
        """Makers of the weights of ``state`` under other names: new name -> its own."""
        return {new: functools.partial(state.__getitem__, own) for new, own in names.items()}


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

    def see(self, job: Job) -> None:
        """The run so far, before ``apply``: its ranks, and its training data where that is open."""

    @abstractmethod
    def apply(self, model: torch.nn.Module, heads: tuple[str, ...]) -> None:
        """Change the model in place. Raises UserError when it cannot be done to this one.

        ``heads``: name parts of the weights that the task may newly initialize, which are trained whatever else is.
        """

    def making(self, model: torch.nn.Module, width: int, rows: int | None) -> dict[str, dict[str, int]]:
        """For plans, after ``apply``: moments before training at which the host's memory is fuller than loading fills
        it, by name, each with its bytes by part.

        ``width``: most tokens of a training row; ``rows``: of the training data, where it is open.
        """
        return {}

    @property
    def freezes_base(self) -> bool:
        """Whether only what this edit leaves trainable is trained, and only that belongs in checkpoints."""
        return False

    def state(self) -> dict[str, Any]:
        """What a checkpoint must know of the model that it belongs to, as JSON; asked of rank 0."""
        return {}

    def check_state(self, state: dict[str, Any]) -> str:
        """What is wrong with going on from a checkpoint with this ``state``; "": nothing. Asked of rank 0."""
        return ""

    def write(self, state: State, model: torch.nn.Module, folder: Path, dtype: torch.dtype) -> bool:
        """Write a form of its own (adapter files) into an export's folder; False: it has none.

        ``state``: of the edited model, by its parameters' names; a weight is asked for when it is written.
        """
        return False

    def remark(self, folder: Path) -> str:
        """What whoever opens the export in a folder has to know, for its model card."""
        return ""

    def plain(self, state: State, model: torch.nn.Module) -> State:
        """The state with weights that are numbers, where this edit keeps them otherwise; before anything is merged."""
        return state

    def merged(self, state: State, model: torch.nn.Module, dtype: torch.dtype) -> State:
        """The state of the plain model that computes the same. Raises UserError when there is none."""
        return state

    @classmethod
    def wrote(cls, folder: Path) -> bool:
        """Whether an export's folder holds this edit's own form."""
        return False

    @classmethod
    def base(cls, folder: Path) -> tuple[str, str | None]:
        """Path or hub id, and revision, of the model that such an export changes. UserError when it is another one.

        Called only where ``wrote`` holds.
        """
        raise NotImplementedError

    @classmethod
    def open(cls, folder: Path, model: torch.nn.Module) -> None:
        """Apply what ``write`` wrote to the base. Raises UserError when the two do not fit.

        Called only where ``wrote`` holds.
        """
        raise NotImplementedError

    def record(self) -> dict[str, Any]:
        """What was done, for the run's record, as JSON."""
        return {}


LINEAR = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")  # transformers' and bitsandbytes' names among them


def inner_linears(model: Any, heads: tuple[str, ...]) -> list[str]:
    """Names of the linear layers of a model but for its output layer and a task's head."""
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    linear = [(name, m) for name, m in model.named_modules() if type(m).__name__ in LINEAR]
    return [name for name, m in linear if not set(name.split(".")) & set(heads) and (output is None or m is not output)]
