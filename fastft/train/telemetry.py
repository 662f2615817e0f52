"""What a run tells: metrics.jsonl (every record, one JSON object a line) and a progress bar."""

import json
import time
from pathlib import Path


class Telemetry:
    """Written by rank 0 only; on other ranks every call does nothing.

    Records carry ``kind`` (run, train, eval, checkpoint, end, ...), ``time`` (Unix seconds) and their own fields. A NaN is
    written as null: JSON knows none.
    """

    def __init__(self, folder: Path, main: bool, total_steps: int = 0, show: bool = True):
        self.file = _append(folder / "metrics.jsonl") if main else None
        self.bar = _Bar(total_steps) if main and show else None

    def record(self, kind: str, **fields) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps({"kind": kind, "time": round(time.time(), 3), **_finite(fields)}) + "\n")
        self.file.flush()

    def progress(self, step: int, **fields) -> None:
        if self.bar:
            self.bar.update(step, **fields)

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.bar:
            self.bar.print(text)

    def close(self) -> None:
        if self.bar:
            self.bar.stop()
        if self.file:
            self.file.close()
        self.bar = self.file = None


class _Bar:
    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]} tokens/s"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=total, loss="-", rate="-")
        self.bar.start()

    def update(self, step: int, loss: float | None = None, rate: float | None = None) -> None:
        fields = {}
        if loss is not None:
            fields = {"loss": f"{loss:.4f}", "rate": f"{rate:,.0f}"}
            if not self.console.is_terminal:  # logs get lines, not a bar
                self.console.print(
                    f"step {step}/{int(self.bar.tasks[0].total)}  loss {fields['loss']}  {fields['rate']} tokens/s",
                    highlight=False,
                )
        self.bar.update(self.task, completed=step, **fields)

    def print(self, text: str) -> None:
        self.bar.console.print(text, highlight=False)

    def stop(self) -> None:
        self.bar.stop()


def read(folder: Path) -> list[dict]:
    """The records of a run, a step once: what a resumed run did again stands in the file twice, and here as it was done last.

    A line cut short by a kill is passed over.
    """
    records = []
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
    file = open(path, "a+b")
    if file.tell():
        file.seek(-1, 2)
        if file.read(1) != b"\n":  # a kill cut the last line short: the next one must not join it
            file.write(b"\n")
    file.close()
    return open(path, "a", encoding="utf-8")


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))) else value
