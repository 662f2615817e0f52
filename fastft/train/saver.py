"""When checkpoints are written, and how ranks agree on it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastft import config as configuration
from fastft.assemble import Job
from fastft.errors import UserError
from fastft.train import checkpoint
from fastft.train.heartbeat import Heartbeat
from fastft.train.schedule import Schedule
from fastft.train.signals import StopRequest
from fastft.train.writer import Writer


class Saver:
    """Writes a run's checkpoints, all ranks together."""

    def __init__(self, job: Job, engine: Any, schedule: Schedule, layout: str, stop: StopRequest, heart: Heartbeat):
        assert job.train is not None
        self.job, self.engine, self.schedule, self.stop, self.heart = job, engine, schedule, stop, heart
        self.folder = Path(job.config.run.dir) / "checkpoints"
        self.writer = Writer(job.ranks)
        self.fixed = {
            "data": job.train.data.key,
            **({"corpus": found} if (found := job.train.data.meta.get("corpus")) else {}),
            "layout": layout,
            "task": job.learned,
            "adapter_only": job.adapter_only,
        }

    def agreed(self) -> int:
        """The signal that any rank has seen (0: none). Raises UserError on every rank when any could not write."""
        ranks = self.job.ranks
        signum, failed = ranks.max([self.stop.signum, bool(self.writer.problem)])
        if failed:
            problems = enumerate(ranks.gather(self.writer.problem))
            raise UserError(
                "; ".join(f"rank {rank}: {problem}" for rank, problem in problems if problem),
                "The older checkpoints are whole: once it is fixed, go on with "
                f"`fastft resume {self.job.config.run.dir}`.",
            )
        return signum

    def save(self, step: int, state: dict[str, Any], best: dict | None, wait: bool) -> Path:
        """Begin to write the checkpoint of a step, once the one before it is on the disk.

        Parameters
        ----------
        state : dict
            Of the loop and its observers, as JSON.
        best : dict or None
            What BEST is to say when this is the best checkpoint so far.
        wait : bool
            Return when this one is on the disk.
        """
        schedule, config = self.schedule, self.job.config
        place = {"step": step, "segments": schedule.segments_at(step), "taken": schedule.taken(step)}
        kept = {type(e).__name__: e.state() for e in self.job.edits} if self.job.ranks.main else {}
        state = {**place, **self.fixed, "edits": kept, **state, "best": best, "config": configuration.dump(config)}
        self.settle(step)
        path = checkpoint.save(
            self.engine, self.writer, self.folder, step, state, config.checkpoint.keep, best is not None
        )
        if wait or config.parallel.offload_dir is not None:  # what lies in files is not copied
            self.settle(step)
        return path

    def settle(self, step: int) -> None:
        """Wait, all ranks together, until everyone's part of the last checkpoint is on the disk; raises on every rank
        when any failed.

        A sign of life is that any rank's write gets on, not that one waits for others: a disk that does not answer, or
        a folder that is not the same for all, is for the watchdog.
        """
        seen = -1.0
        while True:
            self.agreed()
            busy, moved = self.job.ranks.sum([self.writer.busy(), self.writer.moved])
            if not busy:
                break
            if moved != seen:
                seen = moved
                self.heart.beat(step)
            time.sleep(0.02)
        self.agreed()

    def close(self) -> None:
        self.writer.close()
