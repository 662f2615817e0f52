"""`fastft export`: a Hugging Face folder from a training checkpoint, without a process group."""

import sys
from contextlib import redirect_stdout
from pathlib import Path

import torch

from fastft import config as configuration
from fastft.errors import UserError
from fastft.models import load
from fastft.tasks import TASKS
from fastft.train import checkpoint
from fastft.train.export import save


def export_checkpoint(run_dir: Path, to: Path, step: int | None, dtype: str | None) -> Path:
    """Export the newest checkpoint that verifies (or that of ``step``); dtype None: the model's own.

    Under ZeRO 1-3 the float32 master weights are read, so that dtype="fp32" is exact even for a bf16 run.
    """
    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: not a run folder (no config.yaml).", "Give the run.dir of a run.")
    if to.exists():
        raise UserError(f"{to}: exists already.", "Choose another folder, or remove it.")
    config = configuration.load(run_dir / "config.yaml")
    path, manifest, _ = checkpoint.find(run_dir / "checkpoints", step)
    task = TASKS.get(config.task)(config)
    task.load_state(manifest["state"]["task"])
    shape = config.model.model_copy(update={"init": "random"})  # the checkpoint brings the weights
    model, _ = load.build(shape, task.auto_class, (), config.run.seed, **task.model_overrides())
    state, own = weights_of(path, manifest["zero"]), model.state_dict()
    there = {own[name].data_ptr() for name in state if name in own}  # tied weights stand in a checkpoint once
    if missing := [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in there]:
        raise UserError(
            f"{path}: holds no {', '.join(missing[:5])}.", "Export the run's own folder instead: <run.dir>/model."
        )
    return save(model, state, task, to, dtype or config.model.dtype)


def weights_of(path: Path, stage: int) -> dict[str, torch.Tensor]:
    """The weights in a verified checkpoint by name: under ZeRO 1-3 the float32 masters."""
    if stage:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        with redirect_stdout(sys.stderr):  # it prints as it goes
            state = dict(get_fp32_state_dict_from_zero_checkpoint(str(path), tag=checkpoint.TAG))
        if stage == 3:
            return state
        # It knows trained parameters and, but for stage 1, frozen ones; the module's own file has them all.
        return {**_module(path), **state}
    return _module(path)


def _module(path: Path) -> dict[str, torch.Tensor]:
    # DeepSpeed's file holds its own classes; its hash was verified against our manifest just now
    return torch.load(path / checkpoint.TAG / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)[
        "module"
    ]
