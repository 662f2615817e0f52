"""How long a save stops the training, and how long a resume looks for its place in the data.

blocking s      checkpoint.background: false: copy, write, hash, sync, rename
background s    checkpoint.background: true: until training goes on, that is the copy to memory
of blocking     their ratio, median over the rounds; the modes take turns
step s, beside a write s   a training step with nothing else, and while the thread writes: what a save costs in another
            coin
seek            the sample ids of step 10^6 of a set of 10^9 samples, in milliseconds

    python benchmarks/checkpoint.py [--machine NAME] [--rounds 5]
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import common
import torch

from fastft import config as configuration
from fastft.cli import leave
from fastft.data import order
from fastft.optim import FusedAdamW
from fastft.ranks import environment
from fastft.train import checkpoint
from fastft.train.writer import Writer
from fastft.zero import engine
from fastft.zero.settings import deepspeed_config

COLUMNS = {
    "ZeRO": "s",
    "dtype": "s",
    "parameters": ",d",
    "GB": ".2f",
    "blocking s": ".2f",
    "background s": ".3f",
    "of blocking": ".3f",
    "step s": ".2f",
    "beside a write s": ".2f",
    "seek ms": ".2f",
}


def build(zero: int, dtype: str, width: int, run: Path):
    config = configuration.validate(
        {
            "task": "causal_lm",
            "model": {"path": "x", "dtype": dtype},
            "parallel": {"zero": zero},
            "run": {"device": "cpu", "dir": str(run)},
        }
    )
    ranks = environment(config)
    engine.start_process_group()
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(6))).to(
        {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    )
    return engine.build_engine(net, FusedAdamW(net.parameters(), lr=1e-4), deepspeed_config(config, ranks)), ranks


def step(built, width: int) -> float:
    start = time.perf_counter()
    x = torch.ones(64, width, dtype=next(built.module.parameters()).dtype)
    built.set_gradient_accumulation_boundary(True)
    built.backward(built(x).float().square().mean())
    built.step()
    return time.perf_counter() - start


def save(built, writer: Writer, folder: Path, number: int, wait: bool) -> float:
    start = time.perf_counter()
    checkpoint.save(built, writer, folder, number, {}, keep=1)
    if wait:
        writer.wait()
    return time.perf_counter() - start


def measure(zero: int, dtype: str, width: int, rounds: int) -> dict:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        folder = Path(folder)
        built, ranks = build(zero, dtype, width, folder)
        writer, alone, beside, times, number = Writer(ranks), [], [], {True: [], False: []}, 0
        step(built, width)
        for r in range(-1, rounds):
            for wait in (True, False) if r % 2 else (False, True):
                alone.append(step(built, width))
                number += 1
                seconds = save(built, writer, folder / "checkpoints", number, wait)
                if not wait:
                    beside.append(step(built, width))
                    writer.wait()
                if r >= 0:  # the first of each takes new memory from the system
                    times[wait].append(seconds)
        assert not writer.problem, writer.problem
        _, manifest, _ = checkpoint.find(folder / "checkpoints")  # what was written verifies
        size = sum(entry["bytes"] for entry in manifest["files"].values())
    start = time.perf_counter()
    order.sample_ids(10**9, 17, 10**6 * 256, 10**6 * 256 + 256)
    seek = time.perf_counter() - start
    return {
        "ZeRO": str(zero),
        "dtype": dtype,
        "parameters": sum(p.numel() for p in built.module.parameters()),
        "GB": size / 1e9,
        "blocking s": min(times[True]),
        "background s": min(times[False]),
        "of blocking": statistics.median(b / a for a, b in zip(times[True], times[False], strict=True)),
        "step s": min(alone),
        "beside a write s": statistics.median(beside),
        "seek ms": seek * 1000,
    }


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--width", type=int, default=4096, help="of six square layers; 4096: 101 M parameters")

    args = common.arguments(__doc__.splitlines()[0], rounds=5, more=more)
    rows = [
        measure(zero, dtype, 64 if args.quick else args.width, args.rounds)
        for zero, dtype in ((0, "fp32"), (1, "bf16"), (2, "bf16"))
    ]
    common.record("checkpoint", args, rows, COLUMNS)
    engine.stop_process_group()
    leave(0)  # gloo's threads may abort an interpreter that shuts down


if __name__ == "__main__":
    main()
