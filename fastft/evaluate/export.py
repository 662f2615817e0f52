"""`fastft export`: a Hugging Face folder from a training checkpoint, without a process group."""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastft import assemble, rooms
from fastft import config as configuration
from fastft.errors import UserError
from fastft.models import weight_files
from fastft.train import checkpoint
from fastft.train.export import own_dtype, save

log = logging.getLogger(__name__)


def export_checkpoint(
    run_dir: Path, to: Path, step: int | None = None, dtype: str | None = None, merge: bool = False, best: bool = False
) -> Path:
    """Export the newest checkpoint that verifies, that of ``step``, or the best; dtype None: the model's own.

    Of a run with early stopping the best one is exported, as at its end.

    ``merge``: an adapter into its base. Under ZeRO 1-3 the float32 master weights are read, so that dtype="fp32" is
    exact even for a bf16 run.
    """
    config = configuration.load_run(run_dir)
    if to.exists():
        raise UserError(f"{to}: exists already.", "Choose another folder, or remove it.")
    to.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(run_dir) / "checkpoints"
    if step is None and (best or _exports_best(config)) and (found := checkpoint.best(folder)):
        step = found["step"]
        log.warning("the best checkpoint is exported: step %d, %s %.4g", step, found["metric"], found["value"])
    elif best:
        raise UserError(f"{folder}: no checkpoint is known as the best.", "Set checkpoint.best_by for the run.")
    path, manifest, _ = checkpoint.find(folder, step)
    partial = manifest["state"].get("adapter_only")
    job = assemble.start(config, manifest["state"]["task"])
    whole = job.ranks
    if not partial and not config.model.resize_embeddings:  # no weight is needed but those of the checkpoint
        job.ranks = replace(whole, device=torch.device("meta"))
    assemble.add_model(job, "start" if partial else "empty")  # an adapter's checkpoint does not hold the base's weights
    if job.ranks is not whole and weight_files.Layout.of(job.model) is None:  # transformers writes it, at once
        job.ranks = whole
        assemble.add_model(job, "empty")
    state: Mapping[str, Any] = checkpoint.stored(path, manifest).weights()
    own = job.model.state_dict()
    if partial:
        state = ChainMap(state, own)  # type: ignore[arg-type]  # of which nothing is written
    if missing := [name for name in own if name not in state]:
        raise UserError(
            f"{path}: holds no {', '.join(missing[:5])}.", "Export the run's own folder instead: <run.dir>/model."
        )
    return save(job, state, to, dtype or own_dtype(job), {"step": manifest["step"]}, merge)


def _exports_best(config: configuration.Config) -> bool:
    """Whether an observer of the run has the best checkpoint exported."""
    return any(rooms.OBSERVERS.get(name).exports_best for name in config.train.chosen())
