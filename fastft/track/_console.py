"""A run on the terminal: a progress bar, or lines where there is no terminal."""

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """Step, loss, learning rate, tokens/s and peak memory of a run, on standard error."""

    def __init__(self, total: int):
        self.console = Console(stderr=True)
        self.total = total
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[line]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task("train", total=total, line="")
        self.bar.start()

    def update(self, step: int, **logged: float) -> None:
        """``logged``: loss, lr, rate (tokens/s) and memory (bytes), at logging steps."""
        fields: dict[str, Any] = {}
        if logged:
            fields["line"] = (
                f"loss {logged['loss']:.4f}  lr {logged['lr']:.3g}  {logged['rate']:,.0f} tokens/s  "
                f"{logged['memory'] / 1e9:.2f} GB"
            )
            if not self.console.is_terminal:  # logs get lines, not a bar
                self.console.print(f"step {step}/{self.total}  {fields['line']}", highlight=False, soft_wrap=True)
        self.bar.update(self.task, completed=step, **fields)

    def print(self, text: str) -> None:
        self.bar.console.print(text, highlight=False, soft_wrap=True)

    def stop(self) -> None:
        self.bar.stop()
