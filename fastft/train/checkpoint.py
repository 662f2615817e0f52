"""Checkpoints: a folder per step, complete or not there.

``checkpoints/step-N.tmp`` is filled by all ranks (DeepSpeed's files, plus RNG per rank), then rank 0 writes ``MANIFEST.json`` with every
file's size and SHA-256, renames the folder to ``step-N`` and replaces ``LATEST``. A folder is used only after its manifest verifies,
which happens before anything in it is unpickled.
"""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from fastft.data.prepared import sha256_file
from fastft.errors import UserError
from fastft.files import fsync, replacing
from fastft.train.engine import Ranks

log = logging.getLogger(__name__)

TAG = "deepspeed"


def save(engine, folder: Path, step: int, state: dict, ranks: Ranks, keep: int) -> Path:
    """Write step-N, all ranks together. ``state``: what the loop needs to go on, as plain JSON values."""
    final, scratch = folder / f"step-{step}", folder / f"step-{step}.tmp"
    if ranks.main:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(scratch), tag=TAG, save_latest=False)
    torch.save(_rng_state(ranks.device), scratch / f"rng-{ranks.rank}.pt")
    dist.barrier()
    if ranks.main:
        files = {}
        for path in sorted(p for p in scratch.rglob("*") if p.is_file()):
            fsync(path)
            files[str(path.relative_to(scratch))] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        _write_json(scratch / "MANIFEST.json", {"step": step, "world_size": ranks.world, "state": state, "files": files})
        shutil.rmtree(final, ignore_errors=True)
        scratch.rename(final)
        fsync(folder)
        _write_json(folder / "LATEST", {"step": step})
        _prune(folder, keep)
    dist.barrier()
    return final


def steps(folder: Path) -> list[int]:
    """Steps of complete checkpoints, ascending."""
    found = [p.name.removeprefix("step-") for p in folder.glob("step-*") if (p / "MANIFEST.json").is_file()]
    return sorted(int(name) for name in found if name.isdigit())


def find(folder: Path, step: int | None = None) -> tuple[Path, dict, list[str]]:
    """The newest checkpoint that verifies (or the one of ``step``), its manifest, and what is wrong with those passed over (also logged).

    Raises
    ------
    UserError
        There is none, or (when a step was asked for) it is damaged: names the file.
    """
    known = steps(folder)
    if step is not None and step not in known:
        raise UserError(f"{folder}: no checkpoint of step {step}.", f"There are: {known}." if known else "There is none at all.")
    problems = []
    for candidate in [step] if step is not None else reversed(known):
        path = folder / f"step-{candidate}"
        try:
            manifest = json.loads((path / "MANIFEST.json").read_text())
            problem = _damage(path, manifest)
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            problem = f"{path / 'MANIFEST.json'} is damaged."
        if problem is None:
            for passed_over in problems:
                log.warning("%s Going back to %s.", passed_over, path)
            return path, manifest, problems
        problems.append(problem)
    raise UserError(f"{folder}: no usable checkpoint. {' '.join(problems)}".strip(), "Start the run anew with `fastft train`.")


def load(engine, path: Path, manifest: dict, ranks: Ranks) -> dict:
    """Restore model, optimizer and this rank's RNG from a verified checkpoint; returns the loop's state."""
    if manifest["world_size"] != ranks.world:
        raise UserError(f"{path}: was written by {manifest['world_size']} ranks, this run has {ranks.world}.",
                        f"Resume with {manifest['world_size']} ranks, or export the model and start from it.")
    try:
        loaded, _ = engine.load_checkpoint(str(path), tag=TAG)
    except (RuntimeError, KeyError, ValueError, FileNotFoundError) as e:
        raise UserError(f"{path}: does not fit this run's model or settings: {str(e).strip()[:300]}",
                        "Resume with the configuration that the run began with (config.yaml in its folder).") from None
    if loaded is None:
        raise UserError(f"{path}: DeepSpeed could not load it.", "See the log above.")
    rng = torch.load(path / f"rng-{ranks.rank}.pt", weights_only=True)
    torch.set_rng_state(rng["torch"])
    version, keys, position, gauss, cached = rng["numpy"]
    np.random.set_state((version, keys.numpy(), position, gauss, cached))
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(rng["cuda"], ranks.device)
    return manifest["state"]


def _rng_state(device: torch.device) -> dict:
    name, keys, position, gauss, cached = np.random.get_state()
    version, internal, python_gauss = random.getstate()
    state = {"torch": torch.get_rng_state(), "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, gauss, cached),
             "python": (version, list(internal), python_gauss)}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _damage(path: Path, manifest: dict) -> str | None:
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing."
        if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
            return f"{file} does not match its hash."
    return None


def _prune(folder: Path, keep: int) -> None:
    for step in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"step-{step}")
    for stale in folder.glob("step-*.tmp"):
        shutil.rmtree(stale)


def _write_json(path: Path, value: dict) -> None:
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1))
        fsync(scratch)
