"""``batch.micro_tokens: auto``: the most tokens of a forward that fit the memory, found before the first step.

Whole steps are tried on the longest rows, with more of them each time, by the engine that is to train and with a loss
that is NaN, so that they end as every step with such gradients does: nothing is changed. More rows are tried only where
they must fit if all memory that the last trial took grew with its rows (it grows by less: gradients stay as they are).
"""

from __future__ import annotations

import logging
import math
import os
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fastft.config import Config
from fastft.config.sections import FORWARD_TOKENS
from fastft.data.batches import LARGEST
from fastft.errors import UserError
from fastft.plan.memory import STATE_BYTES
from fastft.tasks.base import Batch, Draw
from fastft.zero.parameters import whole_numel

if TYPE_CHECKING:
    from fastft.train.loop import Loop

log = logging.getLogger(__name__)

MARGIN = 0.1  # of a rank's memory, left free
WORTH = 1.1  # a trial must promise so many times the rows of the last
GROWTH = 4  # a trial has at most so many times the rows of the last


def settle(loop: Loop) -> None:
    """Put the number that was found into the run's configuration; all ranks take part and come to the same.

    Raises
    ------
    UserError
        Not even one row fits; or the model learns from a forward alone (batch normalization), so that none can be
        tried.
    """
    job = loop.job
    if any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in job.model.modules()):
        raise UserError(
            f"batch.micro_tokens: auto: {type(job.model).__name__} has batch normalization, which would learn from the "
            "rows that are tried.",
            "Give a number.",
        )
    rows = _longest_first(loop)
    width = _batch(loop, rows[:1]).padded
    most = min(-(-loop.schedule.size // job.ranks.data_world), len(rows))
    if not job.task.pads:
        most = min(most, max(1, LARGEST[job.ranks.device.type] // width))
    room = _Room(loop)

    def used(n: int) -> float:
        batch = _batch(loop, rows[:n]).to(job.ranks.device)
        with room.watched():
            _try(loop, batch, accumulates=n < most)
        share = max(job.ranks.gather(room.used()))
        log.info("batch.micro_tokens: auto: %d rows of %d tokens take %.0f %% of the room", n, width, 100 * share)
        return share

    found, share = largest(used, most)
    if found == 0:
        raise UserError(
            f"batch.micro_tokens: auto: a single row of {width:,} tokens does not fit this rank's memory "
            f"({room.total / 1e9:.1f} GB, of which a tenth is left free).",
            "`fastft plan` names what would make it fit: parallel.activation_checkpointing, parallel.zero, a shorter "
            "data.max_length.",
        )
    if job.ranks.device.type == "cuda":
        torch.cuda.empty_cache()
    tokens = found * width // job.ranks.sequence_world
    if found == most:  # not the memory ended it: evaluations may take more at once
        tokens = max(tokens, in_room(tokens, share))
    batch = job.config.batch.changed(micro_tokens=tokens)
    job.config = job.task.config = job.config.changed(batch=batch)
    if job.ranks.main:
        whole = " (a rank's whole share of a step)" if found == most else ""
        log.warning("batch.micro_tokens: auto: %d rows of %d tokens%s", found, width, whole)


def in_room(tokens: int, share: float) -> int:
    """Tokens that fit where so many take a share of the room, but not more than the default. A share of 0 or less: the
    process had the memory that they take.
    """
    return FORWARD_TOKENS if share <= 0 else min(FORWARD_TOKENS, int(tokens / share))


def largest(used: Callable[[int], float], most: int) -> tuple[int, float]:
    """Most rows that fit, and the share that they take; 0 rows: not even one.

    Parameters
    ----------
    used : callable
        Rows -> share of the room that they take, at most proportional to them; more than 1 does not fit.
    most : int
        More are of no use.
    """
    fits, taken, n = 0, 0.0, 1
    while (share := used(n)) <= 1:
        fits, taken = n, share
        more = min(most, GROWTH * n, int(n / share) if share > 0 else most)
        if more <= n or (more < most and more < WORTH * n):
            break
        n = more
    return fits, taken


def _longest_first(loop: Loop) -> np.ndarray:
    sizes = loop.split.sizes
    totals = np.asarray(sizes).reshape(len(sizes), -1).sum(1)
    most = min(len(totals), loop.schedule.size)
    longest = np.argpartition(-totals, most - 1)[:most]
    return longest[np.argsort(-totals[longest], kind="stable")]


def _batch(loop: Loop, ids: np.ndarray) -> Batch:
    job = loop.job
    return job.task.collate(loop.split, ids, Draw(job.config.run.seed, np.zeros(len(ids), dtype=np.int64)))


def _try(loop: Loop, batch: Batch, accumulates: bool) -> None:
    """A step that changes nothing. ``accumulates``: of two micro-steps."""
    engine, device = loop.engine, loop.job.ranks.device
    counted = {
        name: getattr(engine, name) for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps")
    }
    scale = torch.full((), math.nan, device=device)
    buffers = [(buffer, buffer.clone()) for buffer in engine.module.buffers()]
    drawn = random.getstate(), np.random.get_state()
    engine.train()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            batches = loop.objective.begin_step(engine, [batch, batch] if accumulates else [batch])
            for i, one in enumerate(batches):
                last = i == len(batches) - 1
                loop.stepper.boundary(last)
                loop.stepper.backward(loop.objective.compute_loss(engine, one, scale), last)
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        raise UserError(
            f"batch.micro_tokens: auto: out of memory with {batch.samples} rows of {batch.padded:,} tokens in all.",
            "Another process may have taken memory meanwhile; give a number.",
        ) from None
    if not bool(loop.stepper.skipped()):
        raise RuntimeError("a step that was only to be tried has changed the model")
    for name, value in counted.items():
        setattr(engine, name, value)
    for buffer, before in buffers:
        if buffer.shape == before.shape:
            buffer.copy_(before)
    random.setstate(drawn[0])
    np.random.set_state(drawn[1])


def out_of_memory(error: BaseException) -> bool:
    """Whether torch could not get memory, of a GPU or of the host."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class _Room:
    """The memory that steps may take: what this rank has, less what comes later, and the margin.

    Attributes
    ----------
    total : int
        Bytes that this rank can have in all.
    """

    def __init__(self, loop: Loop):
        job = loop.job
        self.device = job.ranks.device
        job.ranks.barrier()  # all have what they have before training
        self.begun = self._now()
        self.total = self.begun + self._free() // (1 if self.device.type == "cuda" else job.ranks.local_world)
        job.ranks.barrier()  # before anyone takes more
        self.room = (1 - MARGIN) * self.total - self.begun - _later(loop)
        self.peak = 0

    def used(self) -> float:
        """Share of the room at the peak of what was watched."""
        return (self.peak - self.begun) / self.room if self.room > 0 else math.inf

    @contextmanager
    def watched(self) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.peak = torch.cuda.max_memory_reserved(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            yield
            self.peak = _status("VmHWM")

    def _now(self) -> int:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved(self.device)
        if sys.platform != "linux" or not os.access("/proc/self/clear_refs", os.W_OK):
            raise UserError(
                "batch.micro_tokens: auto: this system does not say how much memory a process took at its peak.",
                "Give a number.",
            )
        return _status("VmRSS")

    def _free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else free_memory()


def _later(loop: Loop) -> int:
    """Bytes that come with the first update and, on a CPU, with the first checkpoint."""
    job, optim = loop.job, loop.job.config.optim
    assert job.spec is not None and job.optimizer is not None
    own = sum(whole_numel(p) for p in job.model.parameters() if p.requires_grad)
    if job.config.parallel.zero:
        own = -(-own // job.ranks.world)
    state = len(job.spec.state_tensors) * STATE_BYTES[getattr(optim, "state_dtype", "fp32")] * own
    if getattr(optim, "master", "fp32") == "remainder":
        state += 2 * own
    later = 0 if any(job.optimizer.state.values()) else state
    return later + (state + 8 * own if job.ranks.device.type == "cpu" else 0)  # a copy of all that is saved


def _status(name: str) -> int:
    """Bytes that /proc says of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes of the host's memory that processes here can still take: the machine's, or the control group's if that has
    less.
    """
    found = []
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    groups = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))
    for limit, usage in groups:
        try:
            most, now = ((root / "sys/fs/cgroup" / name).read_text().strip() for name in (limit, usage))
            stat = (root / "sys/fs/cgroup" / limit).with_name("memory.stat").read_text().splitlines()
        except OSError:
            continue
        cache = next((int(line.split()[1]) for line in stat if line.split()[:1] == ["inactive_file"]), 0)
        if most != "max":
            found.append(int(most) - int(now) + cache)
    return max(0, min(found))


@contextmanager
def explained(config: Config, step: int | None = None) -> Iterator[None]:
    """A step that finds no memory, or the checks before the first one (None), raises UserError, which says what to
    lower.
    """
    try:
        yield
    except RuntimeError as e:
        if not out_of_memory(e):
            raise
        said = str(e).strip().splitlines()[0][:300]
        if step is None:
            raise UserError(
                f"the check of the model before the first step: out of memory: {said}",
                "It runs a row of data.max_length: lower that, or set a higher parallel.zero; `fastft plan` says what "
                "each takes.",
            ) from None
        name = "micro_tokens" if config.batch.micro == "auto" else "micro"
        raise UserError(
            f"step {step}: out of memory: {said}",
            f"Lower batch.{name} (now {getattr(config.batch, name)}): the loss stays the same. Or set "
            "parallel.activation_checkpointing: true or a higher parallel.zero; `fastft plan` says what each takes.",
        ) from None
