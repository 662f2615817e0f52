"""LoRA on a base in 4 bits beside the same on one in bf16 or fp32: the loss after some steps, and the peak of memory.

    python benchmarks/quantized.py --data SETS --smollm2 FOLDER [--steps 100] [--length 512] [--dtype fp32]
        [--bases nf4]

The same rows, order, adapters and learning rate; two sequences a step. `loss`: of held-out documents,
`train`: the mean over the last ten steps. Each run is a process of its own; `peak` is its resident memory's. Nothing is
said about speed: on a CPU bitsandbytes unpacks a weight for each product.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import common
import tasks

ROOT = Path(__file__).resolve().parents[1]
BASES = {
    "whole": [],
    "nf4": ["model.quantize=nf4"],
    "nf4 by 64 rows": ["model.quantize={format: nf4, calibrate: 64}"],
    "nf4 by 800 rows in blocks of 32": ["model.quantize={format: nf4, calibrate: 800, block: 32}"],
}
KEPT = (800, 130)  # documents to learn from, and held out


def run(name: str, args: argparse.Namespace, folder: Path) -> dict:
    """One training; what its record says."""
    from fastft import track

    case = dataclasses.replace(tasks.CASES["medical_lora"], kept=KEPT)
    files = tasks.write_rows(case, args.data, folder, False)
    config = {
        "task": "causal_lm",
        "model": {"path": str(args.smollm2), "dtype": args.dtype, "lora": {"r": 16}},
        "data": {"train": files["train"], "eval": files["dev"], "max_length": args.length, "truncation": "truncate"},
        "batch": {"size": 2},
        "optim": {"lr": 2e-4, "schedule": "linear", "warmup": 0.1},
        "train": {"steps": args.steps, "log_every": 1},
        "run": {"dir": str(folder / name.replace(" ", "_")), "device": "cpu", "offline": True, "seed": 17},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(config))
    command = [sys.executable, "-m", "fastft", "train", str(path), *BASES[name]]
    subprocess.run(command, check=True, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": str(ROOT)})
    records = track.read(Path(config["run"]["dir"]))
    trained = [r for r in records if r["kind"] == "train"]
    last = trained[-10:]
    return {
        "name": name,
        "base": args.dtype if name == "whole" else f"{name}, computed in {args.dtype}",
        "loss": next(r["loss"] for r in reversed(records) if r["kind"] == "eval"),
        "train": sum(r["loss"] for r in last) / len(last),
        "first": trained[0]["loss"],
        "peak_gb": max(r["memory"] for r in trained) / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument(
        "--bases", default=",".join(BASES), help="some of these; the others' last rows stay in the table"
    )
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--machine", default=common.default_machine())
    args = parser.parse_args()
    if strange := set(args.bases.split(",")) - set(BASES):
        parser.error(f"--bases: {min(strange)} is none of {', '.join(BASES)}")
    packages = ("torch", "transformers", "peft", "bitsandbytes")
    facts = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": args.machine,
        "cpu": tasks.cpu(),
        "steps": args.steps,
        "length": args.length,
        "documents": KEPT,
    }
    facts["versions"] = {name: metadata.version(name) for name in packages}
    for name in args.bases.split(","):
        with tempfile.TemporaryDirectory() as folder:
            row = {**facts, **run(name, args, Path(folder))}
        with open(common.RESULTS / "quantized.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        write_table(args)


def write_table(args: argparse.Namespace) -> None:
    """The last row of each base with these settings."""
    rows = [json.loads(line) for line in (common.RESULTS / "quantized.jsonl").read_text().splitlines()]
    settings = {"steps": args.steps, "length": args.length, "documents": list(KEPT)}
    last = {r["base"]: r for r in rows if {**r, **settings} == r}
    newest = rows[-1]
    versions = ", ".join(f"{name} {version}" for name, version in newest["versions"].items())
    lines = [
        "# quantized",
        "",
        "Written by `python benchmarks/quantized.py`, which says how. SmolLM2-135M-Instruct on medical documents,",
        f"two sequences of {args.length} tokens a step; {KEPT[0]} documents to learn from (and to round by), "
        f"{KEPT[1]} held out.",
        "",
        f"{newest['machine']} ({newest['cpu']}). {versions}.",
        "",
        f"| base | loss after {args.steps} steps | of the last ten | of the first | peak GB | measured |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['base']} | {r['loss']:.4f} | {r['train']:.4f} | {r['first']:.4f} | {r['peak_gb']:.2f} "
            f"| {r['date']} |"
            for r in last.values()
        ),
    ]
    (common.RESULTS / "quantized.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
