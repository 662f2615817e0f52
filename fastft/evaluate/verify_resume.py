"""`fastft verify-resume`: proves on the user's own run that an interruption changes nothing."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fastft import track
from fastft.config import Config, absolute, dump
from fastft.errors import UserError
from fastft.files import sha256_file
from fastft.launch.agent import find_rank

LIMIT = 24 * 3600  # seconds for a run; whoever verifies longer ones sets train.steps lower


def verify_resume(config: Config, folder: Path, ranks: int, at: int | None, kill: bool) -> dict:
    """Run the configuration twice under ``folder``, the second time interrupted, and compare losses and weights bit
    for bit (with run.deterministic, without which a GPU gives other bits at every run).

    Parameters
    ----------
    at : int, optional
        Step after which the second run is interrupted; default: one at random.
    kill : bool
        Interrupt by SIGKILL of a rank, which loses the steps since the last checkpoint, instead of SIGTERM, which
        saves first.

    Returns
    -------
    dict
        ``steps``, ``interrupted_after``, ``equal``, ``differences`` (texts; empty when equal).

    Raises
    ------
    UserError
        A folder that is there already, a run that fails, one that ends before it could be interrupted.
    """
    whole, broken = folder / "whole", folder / "interrupted"
    if folder.exists():
        raise UserError(f"{folder}: exists already.", "Give a new folder with --folder.")
    folder.mkdir(parents=True)
    for run in (whole, broken):
        settings = absolute(config)
        settings = settings.changed(
            run=settings.run.changed(dir=str(run.absolute()), deterministic=True),
            train=settings.train.changed(log_every=1),
        )
        (folder / f"{run.name}.yaml").write_text(dump(settings), encoding="utf-8")
    _finish(_start(ranks, "train", folder / "whole.yaml"), "the undisturbed run")
    total = max(r["step"] for r in track.read(whole) if r["kind"] == "train")
    if total < 2:
        raise UserError(f"the run has {total} step: nothing to interrupt.", "Raise train.steps.")
    after = at or random.randint(1, total - 1)
    process = _start(ranks, "train", folder / "interrupted.yaml")
    _interrupt(process, broken, after, kill)
    if not kill:
        _finish(_start(ranks, "resume", broken), "the resumed run")
    differences = [*_differing_steps(whole, broken), *_differing_files(whole / "model", broken / "model")]
    return {"steps": total, "interrupted_after": after, "equal": not differences, "differences": differences}


def _start(ranks: int, verb: str, what: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "fastft", "launch", "--nproc", str(ranks), "--backoff", "0", verb, str(what)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _finish(process: subprocess.Popen, which: str, codes: tuple[int, ...] = (0,)) -> None:
    output = process.communicate(timeout=LIMIT)[0]
    if process.returncode not in codes:
        raise UserError(f"{which} failed with exit code {process.returncode}:\n{output[-2000:]}")


def _interrupt(process: subprocess.Popen, run: Path, after: int, kill: bool) -> None:
    while process.poll() is None and not _reached(run, after):
        time.sleep(0.02)
    if process.poll() is not None:
        raise UserError(
            f"the run ended before it could be interrupted after step {after}.",
            "Give an earlier --at, or a longer run.",
        )
    if kill:
        rank = find_rank(run)
        assert rank is not None, "a run that takes steps has a rank"
        os.kill(rank, signal.SIGKILL)
        _finish(process, "the run after its rank was killed")
    else:
        process.send_signal(signal.SIGTERM)
        _finish(process, "the interrupted run", (128 + signal.SIGTERM,))


def _reached(run: Path, step: int) -> bool:
    return (run / "metrics.jsonl").exists() and any(r["kind"] == "train" and r["step"] >= step for r in track.read(run))


def _differing_steps(whole: Path, broken: Path) -> list[str]:
    curves = [
        {r["step"]: (r["loss"], r["lr"], r["grad_norm"]) for r in track.read(run) if r["kind"] == "train"}
        for run in (whole, broken)
    ]
    first = next((s for s in sorted(curves[0]) if curves[0][s] != curves[1].get(s)), None)
    return (
        []
        if first is None
        else [f"step {first}: loss, lr, grad_norm {curves[0][first]} undisturbed, {curves[1].get(first)} resumed"]
    )


def _differing_files(whole: Path, broken: Path) -> list[str]:
    if not list(whole.glob("*.safetensors")):
        return [f"{whole} holds no weights"]
    names = sorted({p.name for folder in (whole, broken) for p in folder.glob("*.safetensors")})
    return [
        f"{name} differs"
        for name in names
        if not all((f / name).exists() for f in (whole, broken))
        or sha256_file(whole / name) != sha256_file(broken / name)
    ]
