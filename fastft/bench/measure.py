"""Steps of the real loop, timed."""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from fastft.bench import advice, flops
from fastft.bench.ceilings import Ceilings, ceilings
from fastft.bench.clock import PARTS, Clock
from fastft.config import Config
from fastft.errors import UserError
from fastft.models.load import dtype_of
from fastft.tasks.base import Batch
from fastft.track import Telemetry
from fastft.train import loop as training
from fastft.train.throughput import Throughput, peak_memory
from fastft.versions import versions
from fastft.zero.parameters import whole_numel


def bench(config: Config, warmup: int = 5, steps: int = 20) -> dict[str, Any]:
    """Take some steps of a run, as training takes them, and tell where the time goes.

    Nothing is evaluated, saved or exported, and ``run.dir`` stays as it is, but for the prepared data, which a
    training finds there.

    Parameters
    ----------
    config : Config
        The run. Its number of steps, evaluations, observers and checkpoints do not matter.
    warmup, steps : int
        Steps that are not counted, and those that are.

    Returns
    -------
    dict
        As JSON, all times in seconds: ``machine``, ``model``, ``tokens_per_second``, ``samples_per_second`` and
        ``step_seconds`` (median, min, max over the steps; tokens are real ones, of all ranks), ``padding`` (share of
        the tokens computed), ``parts`` (the same by part of a step; medians need not add up to the step's; ``share`` is
        of their sum), ``host_seconds`` (until the last launch of a step, on a GPU), ``start_seconds`` (until the first
        step has ended), ``peak_memory`` (bytes of this rank), ``ceilings``, ``of_ceiling`` (``model``: forward and
        backward together; 1: as fast as they allow), ``flops``, ``advice`` and ``losses`` (of every
        step, the warm-up's too).

    Raises
    ------
    UserError
        As training does; or too few steps.
    """
    if warmup < 1 or steps < 3:
        raise UserError(
            f"fastft bench: {warmup} steps of warm-up, {steps} counted.", "At least 1 and 3: the first step is slower."
        )
    begun = time.perf_counter()
    with ExitStack() as cleanup:
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="fastft-bench-")))
        loop = training.build(_steps_only(config, warmup + steps), cleanup, steps_only=True)
        ranks = loop.job.ranks
        log = loop.open(Telemetry(folder, ranks.main, warmup + steps, [], 0))
        cleanup.callback(log.close)
        clock, counted = Clock(ranks.device), _Counted()
        loop.mark, loop.throughput = clock.mark, counted
        loop.engine.train()
        started = 0.0
        cleanup.enter_context(clock.collectives())
        losses: list[torch.Tensor] = []
        clock.begin()
        for loss in loop.steps():
            loop.after_step(loss)
            loop.heart.beat(loop.step)
            clock.end()
            counted.end()
            losses.append(loss)
            if not started:
                if ranks.device.type == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter() - begun
            if loop.step == warmup + steps:
                break
        memory = peak_memory(ranks.device)
        limits = ceilings(ranks, dtype_of(config.model.dtype))
        columns = zip(*counted.steps[warmup:], strict=True)
        tokens, padded, samples = ([n / ranks.sequence_world for n in ranks.sum(column)] for column in columns)
        report = _report(loop, clock, (tokens, padded, samples), limits, warmup, started, memory)
        report["losses"] = ranks.sum([float(loss) / ranks.world for loss in losses])
        return report


class _Counted(Throughput):
    """What each step took: tokens, padded tokens, samples of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[int]] = []
        self.now = [0, 0, 0]

    def add(self, batch: Batch) -> None:
        super().add(batch)
        self.now = [a + b for a, b in zip(self.now, (batch.tokens, batch.padded, batch.samples), strict=True)]

    def end(self) -> None:
        self.steps.append(self.now)
        self.now = [0, 0, 0]


def _steps_only(config: Config, steps: int) -> Config:
    """The run without what stands between its steps; one step more, so that none of these is the last."""
    train, run, data = config.train, config.run, config.data
    observers = dict.fromkeys(train.chosen())
    return config.changed(
        train=train.changed(steps=steps + 1, epochs=None, eval_every=None, eval_at_start=False, **observers),
        checkpoint=config.checkpoint.changed(every=None, best_by=None),
        data=data.changed(cache=data.cache or str(Path(run.dir) / "prepared")),
        run=run.changed(trackers=type(run.trackers)()),
    )


def _report(
    loop: training.Loop,
    clock: Clock,
    counts: Sequence[Sequence[float]],
    limits: Ceilings,
    warmup: int,
    started: float,
    memory: int,
) -> dict[str, Any]:
    model, config, world = loop.job.model, loop.job.config, loop.job.ranks.world
    steps, (tokens, padded, samples) = clock.steps[warmup:], counts
    seconds = [sum(step.values()) for step in steps]
    usual = statistics.median(seconds)
    work = flops.work(model)
    parameters = list(model.parameters())
    parts = {part: _spread([step[part] for step in steps]) for part in PARTS}
    whole = sum(part["median"] for part in parts.values())
    rate = _spread([n / s for n, s in zip(tokens, seconds, strict=True)])
    rate["mean"] = sum(tokens) / sum(seconds)
    computed = sum(padded) / len(padded) / world  # tokens of one rank and step
    model_seconds = parts["forward"]["median"] + parts["backward"]["median"]
    of_ceiling = {
        "model": work.total * computed / limits.matmul / model_seconds,
        "optimizer": _optimizer_bytes(loop.job.optimizer) / limits.copy / max(parts["optimizer"]["median"], 1e-9),
    }
    report: dict[str, Any] = {
        "machine": {
            "device": _device(loop.job.ranks.device),
            "threads": torch.get_num_threads(),
            "ranks": world,
            **versions(),
        },
        "model": {
            "class": type(model).__name__,
            "parameters": sum(map(whole_numel, parameters)),
            "trained": sum(whole_numel(p) for p in parameters if p.requires_grad),
            "dtype": config.model.dtype,
            "zero": config.parallel.zero,
            **{name: loop.job.record[name] for name in ("attention", "layers") if name in loop.job.record},
        },
        "steps": len(steps),
        "tokens_per_second": rate,
        "samples_per_second": _spread([n / s for n, s in zip(samples, seconds, strict=True)]),
        "padding": 1 - sum(tokens) / max(sum(padded), 1.0),
        "step_seconds": {**_spread(seconds), "each": [round(s, 5) for s in seconds]},
        "parts": {name: {**part, "share": part["median"] / whole} for name, part in parts.items()},
        "host_seconds": statistics.median(clock.host[warmup:]),
        "start_seconds": started,
        "peak_memory": memory,
        "ceilings": {
            "copy_bytes_per_second": limits.copy,
            "matmul_flops": limits.matmul,
            "all_reduce_bytes_per_second": limits.all_reduce,
        },
        "of_ceiling": of_ceiling,
        "flops": {
            "per_token": work.total,
            "formula": flops.FORMULA,
            "utilization": work.total * rate["median"] / world / limits.matmul,
        },
    }
    return {**report, "advice": advice.advice(report, config, usual)}


def _spread(values: Sequence[float]) -> dict[str, float]:
    usual = {"median": statistics.median(values), "mean": statistics.fmean(values)}
    return {**usual, "min": min(values), "max": max(values)}


def _optimizer_bytes(optimizer: Any) -> int:
    """What an update reads and writes at least: weights and state both ways, gradients once."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    state = [v for p in weights for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
    return sum(3 * p.nbytes for p in weights) + sum(2 * v.nbytes for v in state)


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return f"CPU {named or platform.processor() or platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
