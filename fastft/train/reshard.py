"""A checkpoint of another number of ranks or another ZeRO stage: through DeepSpeed's universal format, by itself."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from fastft.errors import UserError
from fastft.files import remove
from fastft.optim import FusedAdamW
from fastft.train.engine import Ranks

SETTINGS = {"checkpoint": {"load_universal": True}}  # of the DeepSpeed engine that is to load what convert() made


def needed(manifest: dict, stage: int, sharded: bool, ranks: Ranks) -> bool:
    """Whether a checkpoint must be converted before this run can load it.

    Parameters
    ----------
    sharded : bool
        Whether this run's optimizer state is cut up between ranks: ZeRO 1-3, and stage 0 in bf16.

    Raises
    ------
    UserError
        Between stage 0 in fp32, whose state is whole, and the others.
    """
    before = manifest["zero"]
    if before == stage and (manifest["world_size"] == ranks.world or not sharded):
        return False
    if before != stage and 0 in (before, stage):
        raise UserError(f"The checkpoint was written with parallel.zero = {before}, this run has {stage}.",
                        f"Resume with parallel.zero={before}, or start a new run from the exported model (`fastft export`).")
    return True


def convert(path: Path, tag: str, ranks: Ranks) -> Path:
    """Write the universal form of a verified checkpoint beside it (rank 0); all ranks return its folder, which ``done`` removes."""
    folder = path.with_name(f"{path.name}.universal.tmp")
    problem = [""]
    if ranks.main:
        remove(folder)
        command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(path / tag), "--output_folder", str(folder / tag),
                   "--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
        env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
        run = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if run.returncode:
            problem = [run.stdout[-1500:]]
    if ranks.world > 1:
        dist.broadcast_object_list(problem, src=0)
    if problem[0]:
        raise UserError(f"{path}: DeepSpeed could not convert it for this number of ranks or ZeRO stage:\n{problem[0]}",
                        "Resume with the ranks and the stage that it was written with.")
    return folder


def done(folder: Path, ranks: Ranks) -> None:
    """Remove what ``convert`` made, once every rank has loaded it."""
    if ranks.world > 1:
        dist.barrier()
    if ranks.main:
        remove(folder)


def load(engine, folder: Path) -> None:
    """Load what ``convert`` made, and mend what DeepSpeed's loading leaves wrong."""
    optimizer = engine.optimizer.optimizer
    assert isinstance(optimizer, FusedAdamW)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    with contextlib.redirect_stdout(sys.stderr):
        engine.load_checkpoint(str(folder), tag="deepspeed")
    for group, before in zip(optimizer.param_groups, settings, strict=True):
        group.update(before)  # stage 3 gives every group the settings of the first: weight decay on biases
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()  # one tensor for all groups would be counted up once for each
