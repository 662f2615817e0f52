"""Whether a run that resumes with other ranks or another ZeRO stage is the same run: losses of the steps after the
change against those of the run that was never changed (other samples would show there), and the largest difference of a
weight at the end.

    python benchmarks/reshard.py [--machine NAME] [--steps 50]
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import common
import torch
from launched import Bench
from safetensors.torch import load_file

from fastft import track

GOAL = {"fp32": 1e-6, "bf16": 2e-3}
# (ranks, stage) of the checkpoint -> (ranks, stage) that resume
CASES = {
    "fp32": {
        (1, 1): [(2, 1), (4, 1)],
        (2, 1): [(1, 1), (4, 2), (2, 3)],
        (4, 2): [(2, 2), (1, 1)],
        (2, 3): [(1, 3), (4, 3), (2, 1)],
        (2, 0): [(1, 0), (4, 0)],
    },
    "bf16": {
        (1, 1): [(2, 1)],
        (2, 1): [(1, 1), (4, 3)],
        (2, 2): [(4, 2), (1, 3)],
        (4, 3): [(2, 3), (1, 2)],
        (2, 0): [(1, 0)],
    },
}
COLUMNS = {
    "dtype": "s",
    "ranks, ZeRO": "s",
    "goes on with": "s",
    "steps": "d",
    "largest loss difference": ".1e",
    "goal": ".0e",
    "weights": ".1e",
}


class Reshard(Bench):
    """Runs of a model without dropout, whose masks would differ with the ranks."""

    def __init__(self, folder: Path, before: int, after: int):
        super().__init__(folder, dropout=0.0)
        self.before, self.after = before, after

    def train(self, run: Path, ranks: int, *arguments: str | Path) -> list[float]:
        process = self.start(*arguments, nproc=ranks, watchdog=120)
        if process.wait(1200):
            raise SystemExit(process.text())
        return [r["loss"] for r in track.read(run) if r["kind"] == "train"]

    def unchanged(self, ranks: int, zero: int, dtype: str) -> tuple[Path, list[float]]:
        run = self.run_dir()
        config = self.config(run, zero, dtype, steps=self.before + self.after)
        return run, self.train(run, ranks, "train", config, f"checkpoint.every={self.before}", "checkpoint.keep=9")

    def go_on(self, whole: Path, ranks: int, zero: int) -> tuple[Path, list[float]]:
        run = self.run_dir()
        shutil.copytree(
            whole,
            run,
            ignore=lambda _, names: [
                n
                for n in names
                if n in ("model", "metrics.jsonl") or (n.startswith("step-") and n != f"step-{self.before}")
            ],
        )
        return run, self.train(run, ranks, "resume", run, f"parallel.zero={zero}")


def measure(bench: Reshard, dtype: str) -> list[dict]:
    rows = []
    for (ranks, zero), others in CASES[dtype].items():
        whole, truth = bench.unchanged(ranks, zero, dtype)
        weights = load_file(whole / "model" / "model.safetensors")
        for other_ranks, other_zero in others:
            run, rest = bench.go_on(whole, other_ranks, other_zero)
            assert len(rest) == bench.after, len(rest)
            found = load_file(run / "model" / "model.safetensors")
            rows.append(
                {
                    "dtype": dtype,
                    "ranks, ZeRO": f"{ranks}, {zero}",
                    "goes on with": f"{other_ranks}, {other_zero}",
                    "steps": bench.after,
                    "goal": GOAL[dtype],
                    "largest loss difference": max(
                        abs(a - b) for a, b in zip(rest, truth[-bench.after :], strict=True)
                    ),
                    "weights": max(float((found[n].float() - w.float()).abs().max()) for n, w in weights.items()),
                }
            )
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, default=50, help="after the change")

    args = common.arguments(__doc__.splitlines()[0], more=more)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Reshard(Path(folder), 10, args.steps)
        rows = [row for dtype in CASES for row in measure(bench, dtype)]
    common.record("reshard", args, rows, COLUMNS)
    if bad := [r for r in rows if not r["largest loss difference"] <= r["goal"]]:
        raise SystemExit(f"beyond the goal: {bad}")


if __name__ == "__main__":
    main()
