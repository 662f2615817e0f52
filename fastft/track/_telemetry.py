"""What a run tells: metrics.jsonl (every record, one JSON object a line), the terminal, and trackers."""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastft.config import Config
from fastft.errors import UserError
from fastft.track._console import Bar
from fastft.track.base import Record, Tracker

log = logging.getLogger(__name__)


class Telemetry:
    """Written by rank 0 only; on other ranks every call does nothing.

    A NaN is written as null: JSON knows none.

    Parameters
    ----------
    trackers : sequence of Tracker
        Where records go beside the file; one that fails is logged and left out from then on.
    start : int
        Steps that a resumed run took before.
    """

    def __init__(
        self, folder: Path, main: bool, total_steps: int = 0, trackers: Sequence[Tracker] = (), start: int = 0
    ):
        self.file = _append(folder / "metrics.jsonl") if main else None
        self.bar = Bar(total_steps, start) if main else None
        self.chosen = list(trackers) if main else []
        self.trackers: list[Tracker] = []  # those that are open and have not failed

    def open_trackers(self, folder: Path, config: Config) -> None:
        """The run in ``folder`` begins or is resumed."""
        for tracker in self.chosen:
            self.trackers.append(tracker)
            self._tell(tracker, lambda tracker=tracker: tracker.open(folder, config))

    def record(self, kind: str, **fields: Any) -> None:
        if self.file is None:
            return
        record = Record(kind, round(time.time(), 3), finite(fields))
        self.file.write(json.dumps({"kind": kind, "time": record.time, **record.fields}) + "\n")
        self.file.flush()
        for tracker in list(self.trackers):
            self._tell(tracker, lambda tracker=tracker: tracker.record(record))

    def progress(self, step: int, **fields: Any) -> None:
        if self.bar:
            self.bar.update(step, **fields)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.bar:
            self.bar.print(text)

    def warn(self, text: str) -> None:
        """The same, also where progress is not shown."""
        if self.bar:
            self.bar.print(text, warning=True)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        if self.file:
            self.file.close()
        for tracker in list(self.trackers):
            self._tell(tracker, tracker.close)
        self.bar = self.file = None
        self.trackers = []

    def _tell(self, tracker: Tracker, call) -> None:
        try:
            call()
        except UserError:
            raise
        except Exception as e:  # of the tracker's own client: a lost connection, a full disk of its own
            log.warning("%s failed and gets no more records: %s: %s", type(tracker).__name__, type(e).__name__, e)
            self.trackers.remove(tracker)


def read(folder: Path) -> list[dict]:
    """The records of a run, a step once: what a resumed run did again is in the file twice, and here as it was done
    last.

    A line cut short by a kill is passed over.
    """
    records: list[dict] = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("kind") == "run":
            records = [r for r in records if r.get("step", 0) <= record["start_step"]]
        records.append(record)
    return records


def _append(path: Path):
    with open(path, "a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            if file.read(1) != b"\n":  # a kill cut the last line short: the next one must not join it
                file.write(b"\n")
    return open(path, "a", encoding="utf-8")


def finite(value: Any) -> Any:
    """The same as JSON can hold it: NaN and Inf become None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value
