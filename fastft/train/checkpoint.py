"""Checkpoints: a folder per step, complete or not there.

``checkpoints/step-N.tmp`` is filled by all ranks (DeepSpeed's files, plus RNG per rank; see writer.py), then rank 0
writes ``MANIFEST.json`` with every file's size and SHA-256, renames the folder to ``step-N`` and replaces ``LATEST``.
No file of it can hold code; an older one, whose files are pickles, is used only where they hold state alone.
"""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fastft.data.sources import walk
from fastft.errors import UserError
from fastft.files import digest, fsync, remove, replacing, sha256_file
from fastft.ranks import Ranks
from fastft.train.writer import Writer, point
from fastft.zero import restoring, state_files
from fastft.zero.snapshots import snapshot
from fastft.zero.stored import Stored

log = logging.getLogger(__name__)

TAG = "deepspeed"


def save(engine, writer: Writer, folder: Path, step: int, state: dict, keep: int, best: bool = False) -> Path:
    """Begin to write step-N, all ranks together: copied to memory when this returns, on the disk when ``writer`` is
    done.

    Parameters
    ----------
    state : dict
        What the loop needs to go on, as plain JSON values.
    best : bool
        Whether this becomes the checkpoint that BEST names, which is kept beside the ``keep`` newest.
    """
    ranks = writer.ranks
    final, scratch = folder / f"step-{step}", folder / f"step-{step}.tmp"
    point("begin", ranks.rank)
    if ranks.main:
        remove(scratch)
        scratch.mkdir(parents=True)
    ranks.barrier()
    taken = snapshot(engine, str(scratch), TAG, adapter_only=bool(state.get("adapter_only")))
    point("snapshot", ranks.rank)
    files = {Path(path): value for path, value in taken.items()}
    files[scratch / f"rng-{ranks.rank}{state_files.SUFFIX}"] = _rng_state(ranks.device)

    def finish(entries: dict[str, dict]) -> None:
        point("before-manifest", ranks.rank)
        manifest = {
            "step": step,
            "world_size": ranks.world,
            "zero": engine.zero_optimization_stage(),
            "state": state,
            "files": entries,
        }
        _write_json(scratch / "MANIFEST.json", {**manifest, "digest": digest(manifest)})
        point("before-rename", ranks.rank)
        writer.move()
        remove(final)
        scratch.rename(final)
        fsync(folder)
        point("before-latest", ranks.rank)
        _write_json(folder / "LATEST", {"step": step})
        if best:
            _write_json(folder / "BEST", state["best"])
        point("before-prune", ranks.rank)
        writer.move()
        _prune(folder, step, keep, writer.move)

    writer.write(files, scratch, finish)
    return final


def steps(folder: Path) -> list[int]:
    """Steps of complete checkpoints, ascending."""
    return [step for step in _folders(folder) if (folder / f"step-{step}" / "MANIFEST.json").is_file()]


def _folders(folder: Path) -> list[int]:
    """Steps of all checkpoints, ascending: one without a manifest was whole once, since it has its name from when it
    was.
    """
    found = [p.name.removeprefix("step-") for p in folder.glob("step-*")]
    return sorted(int(name) for name in found if name.isdigit())


def find(folder: Path, step: int | None = None, ranks: Ranks | None = None) -> tuple[Path, dict, list[str]]:
    """The newest checkpoint that verifies (or the one of ``step``), its manifest, and what is wrong with those passed
    over (also logged).

    With ``ranks`` (and a process group) every rank hashes its share of the files, and all come to the same answer.

    Raises
    ------
    UserError
        There is none, or (when a step was asked for) it is damaged: names the file.
    """
    known = _folders(folder)
    if step is not None and step not in known:
        raise UserError(
            f"{folder}: no checkpoint of step {step}.", f"There are: {known}." if known else "There is none at all."
        )
    problems: list[str] = []
    for candidate in [step] if step is not None else reversed(known):
        path = folder / f"step-{candidate}"
        manifest, problem = _verified(path, ranks)
        if problem is None:
            for passed_over in problems if ranks is None or ranks.main else []:
                log.warning("%s Going back to %s.", passed_over, path)
            return path, manifest, problems
        problems.append(problem)
    raise UserError(
        f"{folder}: no usable checkpoint. {' '.join(problems)}".strip(), "Start a new run with `fastft train`."
    )


def stored(path: Path, manifest: dict) -> Stored:
    """The weights and the optimizer state in a verified checkpoint."""
    return Stored(path / TAG, manifest["zero"], manifest["world_size"])


def load(engine, path: Path, manifest: dict, ranks: Ranks) -> dict:
    """Restore model, optimizer and this rank's RNG from a verified checkpoint; returns the loop's state."""
    try:
        restoring.restore(engine, stored(path, manifest), partial=bool(manifest["state"].get("adapter_only")))
        _restore_rng(path, manifest, ranks)
    except (RuntimeError, KeyError, IndexError, TypeError, AttributeError, ValueError, FileNotFoundError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(
            f"{path}: does not fit this run's model or settings: {str(e).strip()[:300]}",
            "Resume with the configuration that the run began with (config.yaml in its folder).",
        ) from None
    return manifest["state"]


def _restore_rng(path: Path, manifest: dict, ranks: Ranks) -> None:
    if manifest["world_size"] != ranks.world:
        # The old ranks' dropout masks are of no use to other ranks; what these draw follows from step and rank.
        torch.manual_seed((manifest["step"] << 20) + ranks.rank)
        return
    own, device = path / f"rng-{ranks.rank}{state_files.SUFFIX}", ranks.device
    rng = state_files.read(own if own.exists() else own.with_suffix(state_files.OLDER))
    torch.set_rng_state(rng["torch"])
    version, keys, position, gauss, cached = rng["numpy"]
    np.random.set_state((version, keys.numpy(), position, gauss, cached))
    version, internal, gauss = rng["python"]
    random.setstate((version, tuple(internal), gauss))
    if device.type == "cuda" and "cuda" in rng:
        torch.cuda.set_rng_state(rng["cuda"], device)


def _rng_state(device: torch.device) -> dict:
    name, keys, position, gauss, cached = np.random.get_state(legacy=True)
    version, internal, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, gauss, cached),
        "python": (version, list(internal), python_gauss),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _verified(path: Path, ranks: Ranks | None) -> tuple[dict, str | None]:
    """The manifest, and what is wrong with the checkpoint (None: nothing), the same on all ranks."""
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    manifest, problem = _manifest(path)
    try:
        problem = problem or _damage(path, manifest, rank, world)
    except OSError as e:
        problem = f"{e.filename or path}: {e.strerror}."
    if ranks:
        problem = next((p for p in ranks.gather(problem) if p), None)
    return manifest, problem


def _manifest(path: Path) -> tuple[dict, str | None]:
    """A checkpoint's manifest, and what is wrong with it (None: nothing)."""
    file = path / "MANIFEST.json"
    try:
        manifest = json.loads(file.read_text())
        whole = manifest.pop("digest") == digest(manifest)
        if not _sensible(manifest):
            return {}, f"{file} is damaged."
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return {}, f"{file} is damaged."
    except OSError as e:
        return {}, f"{e.filename or path}: {e.strerror}."
    return manifest, None if whole else f"{file} does not match its own digest."


def _sensible(manifest: dict) -> bool:
    """Whether a manifest says what one must, whoever wrote it."""
    numbers = {name: manifest[name] for name in ("step", "world_size", "zero")}
    return (
        all(type(value) is int for value in numbers.values())
        and 0 <= manifest["zero"] <= 3
        and 1 <= manifest["world_size"] < 1 << 20
        and isinstance(manifest["state"], dict)
        and all({"bytes", "sha256"} <= entry.keys() for entry in manifest["files"].values())
    )


def best(folder: Path) -> dict | None:
    """``step``, ``metric`` and ``value`` of the checkpoint that BEST names, where it is there."""
    try:
        found = json.loads((folder / "BEST").read_text())
    except (OSError, ValueError):
        return None
    return found if (folder / f"step-{found['step']}").is_dir() else None


def state_of(path: Path) -> dict:
    """The loop's state in a checkpoint, whose manifest must match its own digest. Raises UserError."""
    manifest, problem = _manifest(path)
    if problem:
        raise UserError(problem)
    return manifest["state"]


def _damage(path: Path, manifest: dict, rank: int = 0, world: int = 1) -> str | None:
    for file in walk(path):
        name = file.relative_to(path)
        if _read(name) and str(name) not in manifest["files"]:
            return f"{file} is no part of the checkpoint: remove it."
    for listed, entry in sorted(manifest["files"].items())[rank::world]:
        file, name = path / listed, Path(listed)
        if not file.is_file():
            return f"{file} is missing."
        if file.stat().st_size != entry["bytes"] or sha256_file(file) != entry["sha256"]:
            return f"{file} does not match its hash."
        if _read(name) and (reason := state_files.refused(file)):
            return f"{file} is not read: {reason}."
    return None


def _read(name: Path) -> bool:
    """Whether a file of a checkpoint may be read for its state, by its path in it."""
    return name.suffix in (state_files.SUFFIX, state_files.OLDER) or name.parts[0] == TAG


def _prune(folder: Path, current: int, keep: int, moved: Callable[[], None] = lambda: None) -> None:
    """Keep the newest up to the one just written, and the best. A later step is one that the run went back past,
    because it was damaged.
    """
    best = json.loads((folder / "BEST").read_text())["step"] if (folder / "BEST").exists() else None
    known = steps(folder)
    kept = [step for step in known if step <= current][-keep:]
    for step in known:
        if step not in (*kept, best):
            shutil.rmtree(folder / f"step-{step}")
            moved()
    for stale in folder.glob("step-*.tmp"):
        shutil.rmtree(stale)
        moved()


def _write_json(path: Path, value: dict) -> None:
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(value, indent=1))
        fsync(scratch)
