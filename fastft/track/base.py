"""What a tracker is."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fastft.config import Config, Section
from fastft.errors import UserError


@dataclass(frozen=True)
class Record:
    """Something that a run tells; the line of metrics.jsonl.

    Attributes
    ----------
    kind : str
        run (settings and versions, at the start), train (a logged step), eval (metrics of one set), checkpoint, end,
        ...
    time : float
        Unix seconds.
    fields : dict
        As JSON; ``step`` where it belongs to one.
    """

    kind: str
    time: float
    fields: dict[str, Any]

    def numbers(self) -> dict[str, float]:
        """The fields that are finite numbers, but for ``step``."""
        return {
            name: float(value)
            for name, value in self.fields.items()
            if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
        }


class Tracker(ABC):
    """Sends records elsewhere, from rank 0. One that fails does not end the run: what it raises is logged once.

    Made on all ranks before anything else; UserError when its package is missing.

    Class attributes
    ----------------
    package : str
        The package that it needs, which is fastft's extra of the same name; empty: none.
    """

    Settings: ClassVar[type[Section]] = Section
    package: ClassVar[str] = ""

    def __init__(self, settings: Any):
        self.settings = settings
        if self.package and importlib.util.find_spec(self.package) is None:
            raise UserError(
                f"run.trackers.{self.package}: the package {self.package} is not installed.",
                f"pip install 'fastft[{self.package}]', or remove it from run.trackers.",
            )

    @abstractmethod
    def open(self, folder: Path, config: Config) -> None:
        """The run in ``folder`` begins or is resumed."""

    @abstractmethod
    def record(self, record: Record) -> None: ...

    @abstractmethod
    def close(self) -> None: ...
