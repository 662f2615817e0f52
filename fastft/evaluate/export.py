"""`fastft export`: a Hugging Face folder from a training checkpoint, without a process group."""

from __future__ import annotations

from pathlib import Path

from fastft import assemble
from fastft import config as configuration
from fastft.errors import UserError
from fastft.train import checkpoint
from fastft.train.export import save
from fastft.zero import weights


def export_checkpoint(
    run_dir: Path, to: Path, step: int | None = None, dtype: str | None = None, merge: bool = False
) -> Path:
    """Export the newest checkpoint that verifies (or that of ``step``); dtype None: the model's own.

    ``merge``: an adapter into its base. Under ZeRO 1-3 the float32 master weights are read, so that dtype="fp32" is
    exact even for a bf16 run.
    """
    config = configuration.load_run(run_dir)
    if to.exists():
        raise UserError(f"{to}: exists already.", "Choose another folder, or remove it.")
    path, manifest, _ = checkpoint.find(Path(run_dir) / "checkpoints", step)
    partial = manifest["state"].get("adapter_only")
    job = assemble.start(config, manifest["state"]["task"])
    assemble.add_model(job, "start" if partial else "empty")  # an adapter's checkpoint does not hold the base's weights
    state, own = weights.of_checkpoint(path, checkpoint.TAG, manifest["zero"]), job.model.state_dict()
    if partial:
        state = {**own, **state}
    there = {own[name].data_ptr() for name in state if name in own}  # tied weights are in a checkpoint once
    if missing := [name for name, tensor in own.items() if name not in state and tensor.data_ptr() not in there]:
        raise UserError(
            f"{path}: holds no {', '.join(missing[:5])}.", "Export the run's own folder instead: <run.dir>/model."
        )
    return save(job, state, to, dtype or config.model.dtype, {"step": manifest["step"]}, merge)
