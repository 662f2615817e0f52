"""How long a whole `fastft resume` takes at step 10^6 of a set of 10^9 samples,
against the same at the start of a small set.

small s, large s   from the start of the process to the end of the first step: imports, model, checkpoint, prepared
                   data, the step. The model, the checkpoint's size and the step are the same in both; the runs take
                   turns
beyond s           their difference, median over the rounds
data GB            of the large set's columns. They are sparse files that hold rows where the steps will look, so that
                   they fit on a disk; a memory-mapped page that was never written is mapped like any other

    python benchmarks/resume.py [--machine NAME] [--rounds 5]
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import numpy as np
import yaml
from launched import write_model

from fastft import config as configuration
from fastft import track
from fastft.data import order
from fastft.data.prepared import write_manifest
from fastft.train import loop

SIZE, LENGTH, SEED = 8, 128, 17
COLUMNS = {
    "samples": ",d",
    "step": ",d",
    "data GB": ".0f",
    "small s": ".2f",
    "large s": ".2f",
    "beyond s": ".2f",
    "rounds": "d",
}


def write_config(folder: Path, run: Path, steps: int) -> Path:
    config = {
        "task": "causal_lm",
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "max_length": LENGTH, "truncation": "split", "seed": SEED},
        "batch": {"size": SIZE},
        "optim": {"lr": 1e-4},
        "train": {"steps": steps, "log_every": 1},
        "checkpoint": {"every": 1, "keep": 1},
        "run": {"dir": str(run), "offline": True, "device": "cpu", "threads": 2},
    }
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return path


def enlarge(prepared: Path, samples: int, steps: range) -> float:
    """Turn a prepared split into one of ``samples`` documents of one pack each,
    with tokens in those that the steps ask for; returns its GB.
    """
    manifest = json.loads((prepared / "MANIFEST.json").read_text())
    del manifest["digest"]
    tokens = np.fromfile(prepared / "tokens.values.bin", dtype="<i4")[:LENGTH]
    ids = np.sort(order.sample_ids(samples, SEED, steps.start * SIZE, steps.stop * SIZE))

    def column(name: str, dtype: type, rows: int, write: Callable[[np.ndarray], None]) -> None:
        values = np.lib.format.open_memmap(prepared / f"{name}.npy", mode="w+", dtype=dtype, shape=(rows,))
        write(values)
        values.flush()

    def at(value: float | np.ndarray) -> Callable[[np.ndarray], None]:
        return lambda values: values.__setitem__(ids, value)

    def between(size: int) -> Callable[[np.ndarray], None]:
        """Offsets of rows that lie one after the other; those of the empty rows between them stay unwritten."""

        def write(values: np.ndarray) -> None:
            for i, row in enumerate(ids):
                values[row], values[row + 1] = i * size, (i + 1) * size

        return write

    column("lengths", np.int64, samples, at(LENGTH))
    column("targets", np.float64, samples, at(LENGTH - 1))
    for name, value in (
        ("piece_doc", ids),
        ("piece_start", 0),
        ("piece_length", LENGTH),
        ("origin_file", 0),
        ("origin_row", 1),
    ):
        column(name, np.int64, samples, at(value))
    column("tokens.offsets", np.int64, samples + 1, between(LENGTH))
    column("packs.offsets", np.int64, samples + 1, between(1))
    np.tile(tokens, len(ids)).tofile(prepared / "tokens.values.bin")
    ids.astype("<i4").tofile(prepared / "packs.values.bin")
    for name, entry in manifest["files"].items():
        entry["bytes"] = (prepared / name).stat().st_size
    write_manifest(prepared, manifest)
    return sum(entry["bytes"] for entry in manifest["files"].values()) / 1e9


def train_from(path: Path, step: int) -> None:
    """In a process of its own: the run up to its last step, from ``step`` instead of 0."""
    begin = loop.Loop.__init__

    def at_step(self, *given) -> None:
        begin(self, *given)
        self.step = step

    loop.Loop.__init__ = at_step
    loop.train(configuration.load(path), overwrite=True)


def resume(run: Path, keep: Path, steps: int) -> float:
    """Seconds from the start of the process to the end of its first step."""
    shutil.rmtree(run / "checkpoints")
    shutil.copytree(keep, run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-m", "fastft", "resume", run, f"train.steps={steps}"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    first = next(r for r in track.read(run) if r["kind"] == "train")
    assert first["step"] == steps, first
    return first["time"] - start


def main() -> None:
    if sys.argv[1:2] == ["--train-from"]:
        return train_from(Path(sys.argv[3]), int(sys.argv[2]))

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--samples", type=int, default=10**9)
        parser.add_argument("--step", type=int, default=10**6)

    args = common.arguments(__doc__.splitlines()[0], rounds=5, more=more)
    times: dict[str, list[float]] = {"small": [], "large": []}
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder = Path(name).absolute()
        write_model(folder)
        steps = {"small": 2, "large": args.step}
        for run, last in steps.items():
            path = write_config(folder, folder / run, last)
            if run == "large":
                shutil.copytree(folder / "small" / "prepared", folder / "large" / "prepared")
                size = enlarge(folder / "large" / "prepared" / "train", args.samples, range(last - 2, last + 2))
            subprocess.run(
                [sys.executable, __file__, "--train-from", str(last - 2), path], check=True, stdout=subprocess.DEVNULL
            )
            shutil.move(folder / run / "checkpoints", folder / f"{run}-checkpoints")
            (folder / run / "checkpoints").mkdir()
        for r in range(-1, args.rounds):
            for run in ("small", "large") if r % 2 else ("large", "small"):
                seconds = resume(folder / run, folder / f"{run}-checkpoints", steps[run] + 1)
                if r >= 0:
                    times[run].append(seconds)
    row = {
        "samples": args.samples,
        "step": args.step,
        "data GB": size,
        "small s": min(times["small"]),
        "large s": min(times["large"]),
        "rounds": args.rounds,
        "beyond s": statistics.median(b - a for a, b in zip(times["small"], times["large"], strict=True)),
    }
    if not args.quick:
        common.record("resume", args, [row], COLUMNS)
    print(row)


if __name__ == "__main__":
    main()
