"""What a run was: settings, versions, machine, data."""

from __future__ import annotations

import platform
import sys

import torch

from fastft.assemble import Job
from fastft.ops import cpu
from fastft.train.schedule import Schedule
from fastft.versions import versions
from fastft.zero.parameters import whole_numel


def run_record(job: Job, schedule: Schedule, start: int) -> dict:
    """The first record of a run, and of every time that it is resumed."""
    assert job.train is not None
    splits = [job.train, *job.evals.values()]
    return {
        "config": job.config.model_dump(mode="json"),
        "command": sys.argv[1:],
        "start_step": start,
        "total_steps": schedule.total,
        "sequences_per_step": schedule.size,
        "segments": schedule.segments,
        "data_key": job.train.data.key,
        "eval_keys": {name: split.data.key for name, split in job.evals.items()},
        **({"corpus": found} if (found := job.train.data.meta.get("corpus")) else {}),
        **({"mixture": shares} if (shares := schedule.order.shares(schedule.positions)) else {}),
        "world_size": job.ranks.world,
        "device": str(job.ranks.device),
        "threads": torch.get_num_threads(),
        **({"cpu": cpu.describe()} if job.ranks.device.type == "cpu" else {}),
        "parameters": parameters(job.model),
        "frozen": job.frozen,
        "newly_initialized": job.initialized,
        "data": {s.name: {"sequences": len(s), "tokens": s.totals["tokens"], **s.data.meta["counts"]} for s in splits},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "versions": versions(),
        **job.record,
    }


def sentences(job: Job, schedule: Schedule) -> list[str]:
    """What is said of a run before its first step."""
    assert job.train is not None
    told = [*job.task.describe(job.train), *schedule.order.describe(schedule.positions), cpu_sentence(job)]
    return [sentence for sentence in told if sentence]


def cpu_sentence(job: Job) -> str:
    """What the CPU has and what was chosen for it; "" on a GPU."""
    if job.ranks.device.type != "cpu":
        return ""
    chosen = [f"{name} {job.record[name]}" for name in ("attention", "layers") if name in job.record]
    return "; ".join([f"CPU: {cpu.describe()}", f"{torch.get_num_threads()} threads", *chosen])


def parameters(model: torch.nn.Module, trained: bool = False) -> int:
    """Elements of a model's parameters."""
    return sum(whole_numel(p) for p in model.parameters() if p.requires_grad or not trained)
