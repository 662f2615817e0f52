"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from fastft import rooms
from fastft.config import Config, OutputPath, Section
from fastft.track import _shared
from fastft.track.base import Record, Tracker


class TensorBoardSettings(Section):
    """Where the event files go."""

    folder: OutputPath | None = Field(
        None, description="Folder of the event files; default: <run.dir>/trackers/tensorboard."
    )
    name: str | None = Field(None, description="Folder of this run inside it, for one that several runs share.")


@rooms.TRACKERS.register("tensorboard")
class TensorBoard(Tracker):
    """Curves in TensorBoard's event files. What a resumed run does again replaces what was after its checkpoint."""

    Settings = TensorBoardSettings
    package = "tensorboard"

    def open(self, folder: Path, config: Config) -> None:
        where = Path(self.settings.folder or folder / _shared.FOLDER / "tensorboard")
        self.folder = where / (self.settings.name or "")
        self.given = _shared.settings(config)
        self.writer: Any = None

    def record(self, record: Record) -> None:
        if record.kind == "run":
            self._begin(record.fields["start_step"], record.time)
        for name, value in _shared.points(record).items():
            self.writer.add_scalar(name, value, record.fields["step"], walltime=record.time)

    def _begin(self, step: int, time: float) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard drops what older files hold from purge_step on.
        self.writer = SummaryWriter(str(self.folder), purge_step=step + 1 if step else None, flush_secs=10)
        rows = [f"| {key} | {str(value).replace('|', '&#124;')} |" for key, value in self.given.items()]
        table = "\n".join(["| setting | value |", "|---|---|", *rows])
        self.writer.add_text("settings", table, step, walltime=time)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
