"""A run on the terminal: lines, and below them a bar where there is a terminal; lines alone where there is none."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

QUIET, NORMAL, VERBOSE = -1, 0, 1
_verbosity = NORMAL


def set_verbosity(level: int) -> None:
    """What runs in this process say on standard error: -1: warnings alone, 0: progress, 1: more of it, and what the
    loggers below ``fastft`` have to say.
    """
    global _verbosity
    _verbosity = level
    log = logging.getLogger("fastft")
    log.handlers = [h for h in log.handlers if not isinstance(h, _Details)]
    log.setLevel(logging.INFO if level == VERBOSE else logging.NOTSET)
    log.propagate = level != VERBOSE
    if level == VERBOSE:
        log.addHandler(_Details())


class _Details(logging.Handler):
    """Writes to what is standard error at that time: with a bar, above it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr)


class _Pace(ProgressColumn):
    """Tokens per second; before the first step has ended, how long it has taken so far."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        if task.fields["rate"]:
            return Text(f"{task.fields['rate']:,.0f} tokens/s")
        return Text("" if task.fields["stepped"] else f"first step: {task.elapsed or 0:.0f} s so far")


class Bar:
    """Step, loss, learning rate, tokens/s and peak memory of a run, on standard error.

    Parameters
    ----------
    total : int
        Steps of the run.
    start : int
        Steps that were taken before (a resumed run).
    """

    def __init__(self, total: int, start: int = 0):
        self.console = Console(stderr=True, quiet=_verbosity == QUIET, force_jupyter=False)  # a notebook is no terminal
        self.total = total
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(bar_width=max(4, min(20, self.console.width - 72))),
            _Pace(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal or _verbosity == QUIET,
            transient=True,  # the lines stay
        )
        self.task = self.bar.add_task("train", total=total, completed=start, rate=0.0, stepped=False)
        self.bar.start()
        self.drawn = time.monotonic()

    def update(self, step: int, **logged: float) -> None:
        """``logged``: loss, lr, rate (tokens/s) and memory (bytes), at logging steps; more of them is shown where the
        run is to say more.
        """
        rate: dict[str, Any] = {"rate": logged["rate"]} if logged else {}
        self.bar.update(self.task, completed=step, stepped=True, **rate)
        if logged:
            line = (
                f"step {step}/{self.total}  loss {logged.pop('loss'):.4f}  lr {logged.pop('lr'):.3g}  "
                f"{logged.pop('rate'):,.0f} tokens/s  {logged.pop('memory') / 1e9:.2f} GB"
            )
            if _verbosity == VERBOSE:
                line += "".join(f"  {name} {value:.3g}" for name, value in logged.items())
            self.print(line)
        if (now := time.monotonic()) - self.drawn > 0.02:  # each step, as long as that costs next to nothing
            self.drawn = now
            self.bar.refresh()

    def print(self, text: str, warning: bool = False) -> None:
        """A line above the bar; a warning also where nothing else is to be shown."""
        if warning and self.console.quiet:
            print(text, file=sys.stderr)
        self.bar.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def stop(self) -> None:
        self.bar.stop()
