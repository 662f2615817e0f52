"""About how much memory a run needs on each rank, and how much disk: said before it begins. The formula is the
plan's."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from fastft.plan import memory
from fastft.plan.configured import Disk, gigabytes, planned

if TYPE_CHECKING:
    from fastft.assemble import Job
    from fastft.train.schedule import Schedule


@dataclass(frozen=True)
class Footprint:
    """Bytes; of one rank, but for the disk's.

    Attributes
    ----------
    ranks : int
        How many were reckoned with.
    weights, gradients, optimizer : int
        What stays: parameters, their gradients, the optimizer's state with its master weights.
    activations : int
        What a forward of ``tokens`` tokens holds for its backward.
    tokens : int
    checkpoint : int
        One checkpoint, of all ranks.
    files : int
        In parallel.offload_dir, of all ranks.
    disk : int
        As many checkpoints as are there at a time: those kept, the best, and the one being written; the exported model;
        and the files.
    peak : int
        The most until the last step, without what the process itself takes; of a GPU, or of a CPU's memory.
    fullest : str
        When.
    """

    ranks: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    tokens: int
    checkpoint: int
    files: int
    disk: int
    peak: int
    fullest: str

    def as_dict(self) -> dict[str, int | str]:
        return asdict(self)

    def sentences(self) -> list[str]:
        whose = "the rank" if self.ranks == 1 else f"each of {self.ranks} ranks"
        states = gigabytes(self.weights + self.gradients + self.optimizer)
        return [
            f"memory of {whose}, about: {states} for weights, gradients and optimizer, "
            f"{gigabytes(self.activations)} for activations of {self.tokens:,} tokens at once; "
            f"at most {gigabytes(self.peak)} ({self.fullest}), beside the process itself.",
            Disk(self.checkpoint, self.files, self.disk).sentence,
        ]


def footprint(job: Job, schedule: Schedule) -> Footprint:
    """Of a job that has its data, its model and its optimizer."""
    config, ranks = job.config, job.ranks
    assert job.train is not None
    longest = int(job.train.totals["longest"])
    if getattr(config.data, "packing", "none") == "isolated":
        longest = job.task.max_length
    found = planned(
        config,
        ranks.device.type,
        max(ranks.world, config.parallel.sequence),  # `fastft validate` is one process
        learned=job.learned,
        longest=longest,
        size=min(schedule.size, schedule.positions),
        real=job,
    )
    tensors, setting, plan = found.tensors, found.setting, found.plan
    weights, gradients, optimizer = memory.sharded(
        setting.zero,
        setting.ranks,
        tensors.whole,
        tensors.trained_bytes,
        memory.optimizer(setting, tensors.trained),
    )
    moments = {name: size for name, size in plan.moments.items() if name not in memory.AFTER}
    return Footprint(
        ranks=setting.ranks,
        weights=int(weights),
        gradients=int(gradients),
        optimizer=int(optimizer),
        activations=plan.kept.layers,
        tokens=plan.kept.tokens,
        checkpoint=found.disk.checkpoint,
        files=found.disk.files,
        disk=found.disk.total,
        peak=plan.training,
        fullest=max(moments, key=moments.__getitem__),
    )
