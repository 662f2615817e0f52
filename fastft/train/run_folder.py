"""The folder of a run: who may take it, and what becomes of the run that was in it."""

import fcntl
import os
from pathlib import Path
from typing import TextIO

from fastft import config as configuration
from fastft import track
from fastft.config import Config
from fastft.errors import UserError
from fastft.files import fsync, remove, replacing
from fastft.launch import protocol

OF_A_RUN = (
    "checkpoints",
    "errors",
    "model",
    "metrics.jsonl",
    "config.yaml",
    "trackers",
)  # what a run writes into its folder, beside prepared data


def check(run_dir: Path, config: Config, overwrite: bool) -> None:
    """A new run may take an empty folder, or with --overwrite that of an older run; never anybody else's files."""
    there = [name for name in OF_A_RUN if (run_dir / name).exists()]
    if "checkpoints" in there and not any((run_dir / "checkpoints").iterdir()):  # a disk of its own, mounted there
        there.remove("checkpoints")
    if "metrics.jsonl" not in there:
        if there:
            raise UserError(
                f"run.dir: {run_dir} holds {', '.join(there)}, but is not the folder of a run.",
                "Choose another run.dir; nothing was touched.",
            )
        return
    if not overwrite:
        raise UserError(
            f"run.dir: {run_dir} already holds a run.",
            f"Go on with `fastft resume {run_dir}`, choose another run.dir, or start over with --overwrite.",
        )
    for key, path in configuration.inputs(config).items():
        if path.exists() and run_dir.resolve() in path.resolve().parents:
            raise UserError(
                f"{key}: {path} lies in run.dir, which --overwrite starts over.",
                "Choose another run.dir, or copy it out first.",
            )


def lock(run_dir: Path) -> TextIO:
    """Hold the folder for this process, until it ends. UserError when another has it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    file = open(run_dir / ".lock", "w")  # noqa: SIM115  # the lock lasts as long as it is open
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"run.dir: another process is training in {run_dir}.", "Wait for it, end it, or choose another run.dir."
        ) from None
    except OSError:  # a file system without locks
        pass
    return file


def claim(run_dir: Path, config: Config, resume: bool) -> None:
    """Take the run folder, now that nothing is left to refuse: keep the whole configuration, put an overwritten run
    aside until this one is done.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resume and (run_dir / "metrics.jsonl").exists():
        failed_before = (run_dir / "metrics.jsonl.old").exists()  # then what lies aside is the last good run, and stays
        for name in filter(lambda n: (run_dir / n).exists(), OF_A_RUN):
            path, aside = run_dir / name, run_dir / f"{name}.old"
            if not failed_before:
                path.rename(aside)
            else:
                remove(path)
    if launch := os.environ.get(protocol.LAUNCH):  # so that a launcher that restarts knows this run for its own
        (run_dir / "logs").mkdir(exist_ok=True)
        (run_dir / "logs" / "claimed").write_text(launch)
    with replacing(run_dir / "config.yaml") as scratch:  # never a part of it: nothing could go on from that
        scratch.write_text(configuration.dump(configuration.absolute(config)), encoding="utf-8")
        fsync(scratch)


def finished(run_dir: Path, config: Config) -> UserError | None:
    """What to say of a run that has come to its last step, so that resuming it as ``config`` says would do nothing;
    None: there is something to do, or it ended otherwise.
    """
    if not (run_dir / "metrics.jsonl").is_file() or not (run_dir / "model").is_dir():
        return None
    last = [r for r in track.read(run_dir) if r["kind"] in ("run", "end")][-1:]
    if not last or last[0]["kind"] == "run" or last[0].get("stopped"):
        return None
    saved = [int(p.name.removeprefix("step-")) for p in (run_dir / "checkpoints").glob("step-*[0-9]")]
    if saved and max(saved) < last[0]["step"]:
        return None  # the last checkpoint was taken away: it is made again
    before, config = configuration.load_run(run_dir), configuration.absolute(config)  # as the last start wrote it
    if any(getattr(before, name) != getattr(config, name) for name in ("task", "model", "data", "batch")):
        return None  # refused, or not, by what the checkpoint says
    if (before.train.steps, before.train.epochs) != (config.train.steps, config.train.epochs):
        return None
    steps, epochs = config.train.steps, config.train.epochs or 1
    more = f"train.epochs={epochs + 1:g}" if steps is None else f"train.steps={steps * 2}"
    return UserError(
        f"{run_dir}: finished: all {last[0]['step']:,} steps are done. Model: {run_dir / 'model'}",
        f"For more: fastft resume {run_dir} {more}",
    )


def check_data(written: Path, then: str, now: str) -> None:
    """UserError when prepared training data has another key now than when this file or folder was written."""
    if then != now:
        raise UserError(
            f"{written}: the training data, tokenizer or data settings changed since this was written, or it is from "
            "a fastft that read data otherwise.",
            "Put the old data back, go on with the fastft that began the run, or start a new run from the exported "
            "model.",
        )


def drop_old(run_dir: Path) -> None:
    """Remove what an overwritten run left aside."""
    if not (run_dir / "metrics.jsonl.old").exists():
        return  # nothing of ours
    for name in OF_A_RUN:
        remove(run_dir / f"{name}.old")
