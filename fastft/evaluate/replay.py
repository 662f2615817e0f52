"""`fastft replay`: what each sample of a step does to the model, for a step that was skipped, spiked, or just looks odd."""

from pathlib import Path

import numpy as np
import torch

from fastft import config as configuration
from fastft.errors import UserError
from fastft.evaluate.export import weights_of
from fastft.evaluate.trace import samples
from fastft.models import load
from fastft.train import checkpoint, engine


def replay(run_dir: Path, step: int) -> dict:
    """Loss and gradient norm of every sample of a step, one by one, without dropout, in this process.

    The weights are those of the newest checkpoint before the step, or the model that the run began with.

    Returns
    -------
    dict
        ``weights`` (where they come from) and ``samples``: ``sample`` (id), ``documents``, ``loss`` (per target), ``grad_norm``, largest loss first,
        those that are not finite before all.

    Raises
    ------
    UserError
        Not a run folder, a step that the run does not have, a damaged checkpoint, data that is not what this run has learnt from.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir}: not a run folder (no config.yaml).", "Give the run.dir of a run.")
    config = configuration.load(run_dir / "config.yaml")
    if config.run.offline:
        load.go_offline()
    ranks = engine.environment(config)
    task, split, ids = samples(config, step, run_dir)
    model, _ = load.build(config.model, task.auto_class, task.new_parameters, config.run.seed, **task.model_overrides())
    source = config.model.path
    if before := [s for s in checkpoint.steps(run_dir / "checkpoints") if s < step]:
        path, manifest, _ = checkpoint.find(run_dir / "checkpoints", before[-1])
        model.load_state_dict(weights_of(path, manifest["zero"]), strict=False)  # tied weights stand in it once
        source = str(path)
    task.check_model(model, ranks.device)
    task.attach(model, ranks.device)
    model.to(ranks.device).eval()
    found = [_one(model, task, split, int(i), ranks.device) for i in ids]
    return {
        "weights": source,
        "samples": sorted(found, key=lambda s: (s["loss"] == s["loss"] and s["grad_norm"] < float("inf"), -s["loss"])),
    }


def _one(model: torch.nn.Module, task, split, sample: int, device: torch.device) -> dict:
    batch = task.collate(split, np.array([sample])).to(device)
    scale = torch.tensor(1.0 / float(split.targets[sample]), device=device)
    loss = task.forward_loss(model, batch, scale)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    model.zero_grad(set_to_none=True)
    return {
        "sample": sample,
        "documents": task.documents(split, sample),
        "loss": float(loss.detach()),
        "grad_norm": float(norm),
    }
