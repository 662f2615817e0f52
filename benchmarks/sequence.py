"""Whether ranks that share sequences compute what one rank does: loss and gradients of a step, and the losses of a run.

    python benchmarks/sequence.py [--machine NAME] [--steps 20]

The model of `launched.write_model` (2 layers, 4 heads of queries in 2 groups) without dropout learns from packed
documents, rows of 128 tokens, in fp32 unless a row says otherwise, with AdamW. Given are the largest difference of the
first step's gradients (before clipping; relative to the largest gradient) and of any step's loss (relative) from those
of one rank.

Rows go to results/sequence.jsonl, the table to results/sequence.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import common
import torch
from launched import Bench

from fastft.cli.main import leave
from fastft.launch.hostfile import free_port

ROOT = Path(__file__).resolve().parent.parent
GOAL = {"fp32": 1e-5, "bf16": 5e-2}
RANKS = {1: [1], 2: [2], 4: [4, 2]}  # ranks -> how many share a sequence
VARIANTS: dict[str, list[str]] = {
    "packed": [],
    "one document a row": ["data.packing=none", "data.truncation=truncate"],
    "LoRA": ["model.lora.r=4"],
    "checkpointing, 4 micro-steps": ["parallel.activation_checkpointing=true", "batch.micro=2"],
}
COLUMNS = {
    "run": "s",
    "dtype": "s",
    "ranks": "d",
    "sequence": "d",
    "ZeRO": "d",
    "loss": ".6f",
    "largest loss difference": ".1e",
    "gradients": ".1e",
    "goal": ".0e",
}


def cases(quick: bool) -> list[tuple[str, str, int]]:
    """Variant, dtype, ZeRO stage."""
    if quick:
        return [("packed", "fp32", 0), ("packed", "fp32", 3)]
    found = [("packed", "fp32", zero) for zero in range(4)]
    found += [(name, "fp32", zero) for name in VARIANTS if name != "packed" for zero in (0, 3)]
    return [*found, ("packed", "bf16", 2)]


def measured(config: Path, arguments: list[str], steps: int) -> dict:
    """On every rank: losses, and the first step's gradients by name."""
    from deepspeed.utils import safe_get_full_grad

    from fastft import config as configuration
    from fastft.track import Telemetry
    from fastft.train import loop

    found: dict = {"losses": [], "gradients": {}}
    with ExitStack() as cleanup:
        run = loop.build(configuration.load(config, arguments), cleanup, steps_only=True)
        run.open(Telemetry(config.parent / "telemetry", False, steps, [], 0))
        stage, take = run.job.config.parallel.zero, run.stepper._step

        def step() -> None:
            if run.step == 0:
                for name, p in run.engine.module.named_parameters():
                    if p.requires_grad:
                        found["gradients"][name] = (safe_get_full_grad(p) if stage else p.grad).float().clone()
            take()

        run.stepper._step = step
        run.engine.train()
        for loss in run.steps():
            found["losses"].append(float(run.job.ranks.sum_tensor(loss)) / run.job.ranks.world)
    return found


def as_ranks(world: int, folder: Path, given: list[dict], steps: int) -> list[dict]:
    """All runs of ``given`` in one process group."""
    (folder / "given.json").write_text(json.dumps(given))
    port = str(free_port())
    command = [sys.executable, __file__, "--measure", str(folder), str(steps)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    env |= {"PYTHONPATH": f"{ROOT}:{env.get('PYTHONPATH', '')}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    processes = [
        subprocess.Popen(command, env={**env, **sizes, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(world)
    ]
    codes = [process.wait(1200) for process in processes]
    if any(codes):
        raise SystemExit("a rank failed")
    return torch.load(folder / "found.pt")


def rank(folder: Path, steps: int) -> None:
    found = [
        measured(Path(one["config"]), one["arguments"], steps)
        for one in json.loads((folder / "given.json").read_text())
    ]
    if os.environ["RANK"] == "0":
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()
    leave(0)


def measure(steps: int, quick: bool) -> list[dict]:
    rows, truth = [], {}
    with tempfile.TemporaryDirectory() as name:
        bench = Bench(Path(name), dropout=0.0)
        for world, shared in RANKS.items():
            chosen = [(case, n) for n in shared for case in cases(quick)]
            given = []
            for (variant, dtype, zero), n in chosen:
                config = bench.config(bench.run_dir(), zero, dtype, steps=steps)
                given.append({"config": str(config), "arguments": [*VARIANTS[variant], f"parallel.sequence={n}"]})
            for ((variant, dtype, zero), n), found in zip(
                chosen, as_ranks(world, Path(name), given, steps), strict=True
            ):
                one = truth.setdefault((variant, dtype, zero), found)
                largest = max(float(g.abs().max()) for g in one["gradients"].values())
                gradients = [
                    float((found["gradients"][k] - g).abs().max()) / largest for k, g in one["gradients"].items()
                ]
                losses = [abs(a - b) / b for a, b in zip(found["losses"], one["losses"], strict=True)]
                rows.append(
                    {
                        "run": variant,
                        "dtype": dtype,
                        "ranks": world,
                        "sequence": n,
                        "ZeRO": zero,
                        "loss": found["losses"][0],
                        "largest loss difference": max(losses),
                        "gradients": max(gradients),
                        "goal": GOAL[dtype],
                    }
                )
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--measure"]:
        rank(Path(sys.argv[2]), int(sys.argv[3]))
        return

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--steps", type=int, default=20)

    args = common.arguments(__doc__.splitlines()[0], more=more)
    args.threads = 1  # of each rank
    rows = measure(args.steps, args.quick)
    common.record("sequence", args, rows, COLUMNS)
    if bad := [r for r in rows if not max(r["largest loss difference"], r["gradients"]) <= r["goal"]]:
        raise SystemExit(f"beyond the goal: {bad}")


if __name__ == "__main__":
    main()
