"""A checkpoint of another number of ranks or another ZeRO stage: through DeepSpeed's universal format, by itself."""

import argparse
import contextlib
import io
import sys
from pathlib import Path

import torch
from deepspeed.checkpoint import ds_to_universal

from fastft.errors import UserError
from fastft.files import remove
from fastft.optim.optimizers.base import OptimizerSpec
from fastft.ranks import Ranks
from fastft.zero import pickles

CONVERTED = ("exp_avg", "exp_avg_sq")  # what DeepSpeed's converter knows
SETTINGS = {"load_universal": True}  # checkpoint settings of the DeepSpeed engine that is to load what convert() made


def needed(manifest: dict, stage: int, ranks: Ranks, spec: OptimizerSpec) -> bool:
    """Whether a checkpoint must be converted before this run can load it.

    Raises
    ------
    UserError
        Between stage 0, whose state is whole, and the others; for an optimizer whose state DeepSpeed cannot convert.
    """
    before = manifest["zero"]
    if before == stage and (manifest["world_size"] == ranks.world or stage == 0):
        return False
    if before != stage and 0 in (before, stage):
        raise UserError(
            f"The checkpoint was written with parallel.zero = {before}, this run has {stage}.",
            f"Resume with parallel.zero={before}, or start a new run from the exported model (`fastft export`).",
        )
    if spec.state_tensors != CONVERTED:
        raise UserError(
            f"The checkpoint was written by {manifest['world_size']} ranks at parallel.zero = {before}, this run has "
            f"{ranks.world} and {stage}: the state of optim.name: {spec.config.optim.name} cannot be converted.",
            "Resume with the ranks and the stage that it was written with, or start a new run from the exported model.",
        )
    return True


def convert(path: Path, tag: str, stage: int, ranks: Ranks) -> Path:
    """Write the universal form of a verified checkpoint beside it (rank 0), for this stage; all ranks return its
    folder, which ``done`` removes.
    """
    folder = path.with_name(f"{path.name}.universal.tmp")
    problem = [""]
    if ranks.main:
        remove(folder)
        what = argparse.Namespace(
            input_folder=str(path / tag),
            output_folder=str(folder / tag),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
        try:
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):  # it prints as it goes
                ds_to_universal.main(what)
        except Exception as e:  # whatever it meets, every rank must hear of it
            problem = [f"{type(e).__name__}: {e}"]
        else:
            _fit(folder / tag, stage, ranks.world)
    problem = ranks.from_main(problem)
    if problem[0]:
        raise UserError(
            f"{path}: DeepSpeed could not convert it for this number of ranks or ZeRO stage:\n{problem[0]}",
            "Resume with the ranks and the stage that it was written with.",
        )
    return folder


def _fit(folder: Path, stage: int, world: int) -> None:
    """Put what DeepSpeed reads beside the universal weights where this stage looks for it, and as it reads it.

    Its converter writes it for the stage that the checkpoint came from: the counters in one file or in one per rank,
    the step per parameter or once, the groups' settings on their own or with the state, the weights flat or in shape.
    """
    found = sorted(folder.glob("*model_states.pt"))
    counters = pickles.load(found[0], map_location="cpu")
    counters["module"] = {}  # the weights come from the universal folder
    for file in found:
        file.unlink()
    for name in (
        [f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(world)]
        if stage == 3
        else ["mp_rank_00_model_states.pt"]
    ):
        torch.save(counters, folder / name)

    weights = folder / "zero"
    before = pickles.load(weights / "optimizer_state.pt", map_location="cpu")
    trained = [file.parent for file in weights.glob("*/exp_avg.pt")]
    step = (
        before["optimizer_state_dict"]["state"][0]["step"]
        if "optimizer_state_dict" in before
        else pickles.load(trained[0] / "step.pt")
    )
    after = {key: before[key] for key in ("loss_scaler", "dynamic_loss_scale", "overflow", "param_groups")}
    after |= {
        "ds_version": counters["ds_version"],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": before["param_groups"]},
    }
    torch.save(after, weights / "optimizer_state.pt")
    shapes = {name: shape for group in counters["param_shapes"] for name, shape in group.items()}
    for parameter in trained:
        torch.save(step, parameter / "step.pt")
        for file in (parameter / f"{name}.pt" for name in ("fp32", "exp_avg", "exp_avg_sq")):
            if torch.is_tensor(value := pickles.load(file, map_location="cpu")):  # stage 3's: flat, bare
                torch.save({"param": value[: shapes[parameter.name].numel()].view(shapes[parameter.name])}, file)


def done(folder: Path, ranks: Ranks) -> None:
    """Remove what ``convert`` made, once every rank has loaded it."""
    ranks.barrier()
    if ranks.main:
        remove(folder)


def expect(engine, universal: bool) -> None:
    """Say what the next load reads: DeepSpeed asks a setting that an engine is built with; a run may read both."""
    engine._config.load_universal_checkpoint = universal


def load(engine, folder: Path, tag: str) -> None:
    """Load what ``convert`` made, and fix what DeepSpeed's loading leaves wrong."""
    optimizer = engine.optimizer.optimizer
    with contextlib.redirect_stdout(sys.stderr):
        engine.load_checkpoint(str(folder), tag=tag)
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()  # one tensor for all groups would be counted up once for each
