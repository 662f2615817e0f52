"""`fastft replay`: what each sample of a step does to the model, for a step that was skipped, spiked, or just looks
odd.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fastft import assemble
from fastft import config as configuration
from fastft.assemble import Job
from fastft.data.orders.base import Samples
from fastft.evaluate.trace import samples_of
from fastft.tasks.base import Draw
from fastft.train import checkpoint


def replay(run_dir: Path, step: int) -> dict:
    """Loss and gradient norm of every sample of a step, one by one, without dropout, in this process.

    The weights are those of the newest checkpoint before the step, or the model that the run began with.

    Returns
    -------
    dict
        ``weights`` (where they come from) and ``samples``: ``sample`` (id), ``documents``, ``loss`` (per target),
        ``grad_norm``, largest loss first, those that are not finite before all.

    Raises
    ------
    UserError
        Not a run folder, a step that the run does not have, a damaged checkpoint, data that is not what this run has
        learned from.
    """
    config = configuration.load_run(run_dir)
    job, samples = samples_of(config, step, run_dir)
    assemble.add_model(job)
    source = config.model.path
    if before := [s for s in checkpoint.steps(run_dir / "checkpoints") if s < step]:
        path, manifest, _ = checkpoint.find(run_dir / "checkpoints", before[-1])
        state = checkpoint.stored(path, manifest).weights()
        job.model.load_state_dict(dict(state), strict=False)  # an adapter's has no base
        source = str(path)
    assemble.add_objective(job)
    job.model.eval()
    found = [_one(job, samples, row) for row in range(len(samples.ids))]

    def first(s: dict) -> tuple:
        return (s["loss"] == s["loss"] and s["grad_norm"] < float("inf"), -s["loss"])

    return {"weights": source, "samples": sorted(found, key=first)}


def _one(job: Job, samples: Samples, row: int) -> dict:
    assert job.train is not None and job.objective is not None
    sample, device = int(samples.ids[row]), job.ranks.device
    draw = Draw(job.config.run.seed, samples.epochs[row : row + 1])
    batch = job.task.collate(job.train, np.array([sample]), draw).to(device)
    scale = torch.tensor(1.0 / float(job.train.targets[sample]), device=device)
    loss = job.objective.compute_loss(job.model, batch, scale)
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in job.model.parameters() if p.grad is not None])
    job.model.zero_grad(set_to_none=True)
    documents = job.task.documents(job.train, sample)
    return {"sample": sample, "documents": documents, "loss": float(loss.detach()), "grad_norm": float(norm)}
