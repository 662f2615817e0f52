"""MLflow: a run on a tracking server, or in the run's folder."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import Field

from fastft import rooms
from fastft.config import Config, Section
from fastft.track import _shared
from fastft.track.base import Record, Tracker

LONGEST = 6000  # characters of a parameter's value
STATUS = {"end": "FINISHED", "interrupted": "KILLED"}


class MLflowSettings(Section):
    """Which server, and under which names."""

    uri: str | None = Field(
        None,
        description="Tracking URI; default: MLFLOW_TRACKING_URI, or else a folder of files, <run.dir>/trackers/mlflow.",
    )
    experiment: str = Field("fastft", description="Experiment of the run; made when there is none of the name.")
    name: str | None = Field(None, description="Name of the run; default: that of run.dir.")
    tags: dict[str, str] = Field({}, description="Tags of the run.")


@rooms.TRACKERS.register("mlflow")
class MLflow(Tracker):
    """Parameters, metrics and the state of a run. A resumed run goes on as the same MLflow run."""

    Settings = MLflowSettings
    package = "mlflow"

    def open(self, folder: Path, config: Config) -> None:
        # A server that is gone must not hold the training for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        local = folder.absolute() / _shared.FOLDER / "mlflow"
        uri = self.settings.uri or os.environ.get("MLFLOW_TRACKING_URI") or local.as_uri()
        if uri == local.as_uri():
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 refuses folders otherwise
            local.parent.mkdir(parents=True, exist_ok=True)
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        before = _shared.remembered(folder, "mlflow")
        self.status = "FAILED"
        self.run = self._resumed(before, uri) or self._new(folder, uri)
        self._parameters(_shared.settings(config))

    def _resumed(self, before: dict[str, str], uri: str) -> str | None:
        if before.get("uri") != uri:
            return None
        self.client.update_run(before["run"], status="RUNNING")
        return before["run"]

    def _new(self, folder: Path, uri: str) -> str:
        settings = self.settings
        experiment = self.client.get_experiment_by_name(settings.experiment)
        of = experiment.experiment_id if experiment else self.client.create_experiment(settings.experiment)
        name = settings.name or folder.absolute().name
        run = self.client.create_run(of, tags=settings.tags, run_name=name).info.run_id
        _shared.remember(folder, "mlflow", run=run, uri=uri)
        return run

    def _parameters(self, given: dict[str, Any]) -> None:
        """MLflow's parameters are written once: what a resumed run changes becomes a tag."""
        from mlflow.entities import Param, RunTag

        there = self.client.get_run(self.run).data.params
        new, changed = [], []
        for key, value in ((_key(key), _short(str(value))) for key, value in given.items()):
            if key not in there:
                new.append(Param(key, value))
            elif there[key] != value:
                changed.append(RunTag(f"changed.{key}", value))
        for start in range(0, max(len(new), len(changed)), 100):  # MLflow's limit of a batch
            self.client.log_batch(self.run, params=new[start : start + 100], tags=changed[start : start + 100])

    def record(self, record: Record) -> None:
        from mlflow.entities import Metric

        self.status = STATUS.get(record.kind, self.status)
        at = round(1000 * record.time)
        metrics = [Metric(_key(k), v, at, record.fields["step"]) for k, v in _shared.points(record).items()]
        if metrics:
            self.client.log_batch(self.run, metrics=metrics)

    def close(self) -> None:
        self.client.set_terminated(self.run, status=self.status)


def _key(name: str) -> str:
    """Of the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def _short(value: str) -> str:
    return value if len(value) <= LONGEST else f"{value[: LONGEST - 40]}... ({len(value)} characters)"
