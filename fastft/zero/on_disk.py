"""What ZeRO offloads, on a disk instead of in memory: parallel.offload_dir."""

import logging
from pathlib import Path
from typing import Any

import torch

from fastft import mapped

log = logging.getLogger(__name__)

IN_MEMORY = ("tmpfs", "ramfs")  # file systems


def onto_disk(zero: Any, folder: Path, parameters: bool) -> None:
    """Move the masters of a ZeRO optimizer that offloads into files of this folder, and at stage 3 with ``parameters``
    the shards of the weights. UserError where the disk has no room.
    """
    kind = _file_system(folder)
    if kind in IN_MEMORY:
        log.warning("parallel.offload_dir: %s is a %s: it lies in memory", folder, kind)
    for master in _masters(zero):
        if master.device.type == "cpu":
            master.data = mapped.moved(master.data, folder)
    if not parameters:
        return
    shards = [param.ds_tensor for params in zero.fp16_groups for param in params]
    for i, whole in enumerate(zero.param_groups_fp16_flat_cpu_memory):
        there, begin = mapped.moved(whole, folder), whole.data_ptr()
        inside = range(begin, begin + whole.numel() * whole.element_size())
        for part in (*zero.fp16_partitioned_groups_flat, *shards):
            if part.numel() and part.data_ptr() in inside:
                part.data = there.narrow(0, (part.data_ptr() - begin) // part.element_size(), part.numel())
        zero.param_groups_fp16_flat_cpu_memory[i] = there


def _masters(zero: Any) -> list[torch.Tensor]:
    three = hasattr(zero, "fp32_partitioned_groups_flat")
    return zero.fp32_partitioned_groups_flat if three else zero.single_partition_of_fp32_groups


def on_disk(zero: Any) -> bool:
    """Whether that was done."""
    return any(map(mapped.is_mapped, _masters(zero)))


def state_onto_disk(optimizer: Any) -> None:
    """Move the state of every parameter that lies in a file beside it: what was made or loaded since the last time."""
    for parameter, state in optimizer.state.items():
        if isinstance(parameter, torch.Tensor) and mapped.is_mapped(parameter):
            for name, value in state.items():
                if torch.is_tensor(value) and value.device.type == "cpu":
                    state[name] = mapped.beside(parameter, value)


def _file_system(folder: Path) -> str:
    """Its type, as Linux calls it; nothing where it is not told."""
    best, kind = "", ""
    try:
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            _, place, own, *_ = line.split(" ")
            if folder.resolve().is_relative_to(place) and len(place) >= len(best):
                best, kind = place, own
    except OSError:
        pass
    return kind
