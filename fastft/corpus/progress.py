"""How far a corpus is: a bar on a terminal, a line now and then elsewhere. On standard error."""

from __future__ import annotations

import sys
import time
from typing import Any

from fastft.corpus.build import Build

EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Call it after every block."""

    def __init__(self) -> None:
        self.began = self.said = time.monotonic()
        self.first: int | None = None  # bytes that were read before
        self.bar: Any = None

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("prepare"), BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
            self.bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.task = self.bar.add_task("")
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def __call__(self, build: Build) -> None:
        now = time.monotonic()
        if self.bar is None and now - self.said < EVERY:
            return
        done, whole = build.read()
        self.first = done if self.first is None else self.first
        seconds = max(now - self.began, 1e-9)
        rate = (done - self.first) / seconds
        kept = sum(s.tokens for s in build.shards) + (build.writer.tokens if build.writer else 0)
        said = f"{done / 1e6:,.0f} of {whole / 1e6:,.0f} MB, {rate / 1e6:.1f} MB/s, {kept:,} tokens"
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=whole, description=said)
        else:
            left = f", {(whole - done) / rate:,.0f} s left" if rate > 0 else ""
            print(f"prepare: {said}{left}", file=sys.stderr)
        self.said = now
