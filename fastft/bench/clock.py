"""The time that each part of a step takes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

PARTS = ("data", "forward", "backward", "communication", "optimizer", "other")

# What ZeRO and fastft call between ranks, as attributes of torch.distributed.
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "broadcast",
    "broadcast_object_list",
    "barrier",
)


class Clock:
    """Seconds by part, step by step.

    On a GPU parts are told apart by events in the stream, so that nothing waits for the device inside a step; the time
    until the last launch of a step returned is kept beside it, as the host's.
    """

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.taken: list[list[tuple[str, Any, float]]] = []  # the marks of every step
        self.host: list[float] = []
        self.waited = 0.0  # in collectives, since the last mark
        self.marks: list[tuple[str, Any, float]] = []
        self.begin()

    def begin(self) -> None:
        """A step begins here, and none is under way."""
        self.marks = [("", self._now(), time.perf_counter())]
        self.waited = 0.0

    def mark(self, part: str) -> None:
        """``part`` has ended here."""
        self.marks.append((part, self._now(), self.waited))
        self.waited = 0.0

    def end(self) -> None:
        """The step has ended, and the next one begins."""
        self.mark("other")
        self.host.append(time.perf_counter() - self.marks[0][2])
        self.taken.append(self.marks)
        last = self.marks[-1][1]
        self.begin()
        self.marks[0] = ("", last, self.marks[0][2])  # nothing lies between two steps

    @property
    def steps(self) -> list[dict[str, float]]:
        """Seconds by part of every step. Waits for the device: to be asked for when all are taken."""
        if self.cuda:
            torch.cuda.synchronize()
        steps = []
        for marks in self.taken:
            found = dict.fromkeys(PARTS, 0.0)
            for (_, before, _), (part, now, waited) in itertools.pairwise(marks):
                found[part] += (before.elapsed_time(now) / 1e3 if self.cuda else now - before) - waited
                found["communication"] += waited
            steps.append(found)
        return steps

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def collectives(self) -> Iterator[None]:
        """Time what waits for other ranks (gloo; NCCL's run in streams of their own, which no host sees)."""
        plain: dict[str, Callable] = {name: getattr(dist, name) for name in COLLECTIVES}
        for name, function in plain.items():
            setattr(dist, name, self._timed(function))
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(dist, name, function)

    def _timed(self, function: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                work = function(*args, **kwargs)
            finally:
                self.waited += time.perf_counter() - start
            return work if work is None else _Waited(work, self)

        return timed


class _Waited:
    """A collective under way, whose ``wait`` is timed."""

    def __init__(self, work: Any, clock: Clock):
        self._work, self._clock = work, clock

    def wait(self, *args: Any) -> Any:
        start = time.perf_counter()
        try:
            return self._work.wait(*args)
        finally:
            self._clock.waited += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
