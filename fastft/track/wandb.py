"""Weights & Biases."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from fastft import rooms
from fastft.config import Config, OutputPath, Section
from fastft.track import _shared
from fastft.track.base import Record, Tracker


class WandbSettings(Section):
    """Where the run is kept, and under which names."""

    project: str = Field("fastft", description="Project of the run.")
    entity: str | None = Field(None, description="User or team; default: the account's.")
    name: str | None = Field(None, description="Name of the run; default: that of run.dir.")
    tags: list[str] = Field([], description="Tags of the run.")
    mode: Literal["auto", "online", "offline"] = Field(
        "auto",
        description="auto: online when WANDB_API_KEY is set and run.offline is not; offline: files for `wandb sync`.",
    )
    folder: OutputPath | None = Field(None, description="Folder of its files; default: <run.dir>/trackers/wandb.")


@rooms.TRACKERS.register("wandb")
class Wandb(Tracker):
    """Curves by step, with the settings as the run's config. A resumed run goes on under the same id."""

    Settings = WandbSettings
    package = "wandb"

    def open(self, folder: Path, config: Config) -> None:
        import wandb

        s = self.settings
        mode = s.mode
        if mode == "auto":
            mode = "online" if os.environ.get("WANDB_API_KEY") and not config.run.offline else "offline"
        where = Path(s.folder or folder / _shared.FOLDER / "wandb")
        where.mkdir(parents=True, exist_ok=True)
        known = _shared.remembered(folder, "wandb").get("run")
        self.ended = False
        self.run = wandb.init(
            project=s.project,
            entity=s.entity,
            name=s.name or folder.absolute().name,
            tags=s.tags,
            id=known,
            resume="allow" if known else None,
            config=_shared.settings(config),
            allow_val_change=True,
            dir=str(where),
            mode=mode,
            settings=wandb.Settings(silent=True, console="off", init_timeout=30),
        )
        _shared.remember(folder, "wandb", run=self.run.id)
        # By our step: wandb's own only rises, and a resumed run does some steps again.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def record(self, record: Record) -> None:
        self.ended = self.ended or record.kind == "end"
        if found := _shared.points(record):
            self.run.log({"step": record.fields["step"], **found})

    def close(self) -> None:
        import wandb

        self.run.finish(exit_code=0 if self.ended else 1)
        wandb.teardown()  # its service process
