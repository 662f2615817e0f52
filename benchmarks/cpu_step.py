"""Whole training steps of a 135 M Llama on a CPU: fastft beside Hugging Face Trainer, step by step in turns.

    python benchmarks/cpu_step.py --model FOLDER --peers-python PYTHON [--cases NAME ...] [--pairs 5] [--machine NAME]

FOLDER holds a causal model, such as SmolLM2-135M; PYTHON has torch and transformers (`make peers`). A step is 4 rows of
512 tokens; both train the same weights on the same rows, with clipping and AdamW, each in a process of its own that
waits while the other computes. Ratios are of CPU time (all threads; waiting threads sleep), which neighbours disturb
less than the clock; the row has both. fastft's process is its real training loop, defaults all through.

fp32-whole     a document fills its row
fp32-isolated  several documents a row, which do not see each other
bf16-layer     one layer, a small vocabulary: on a CPU without bf16 instructions a whole step of Trainer takes minutes
bf16-fp32      fastft alone, isolated documents: bf16 beside fp32
bf16-whole     where asked for, on a CPU with bf16 instructions
bf16-isolated  likewise
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parents[1]
ROWS, LENGTH = 4, 512
CASES = ("fp32-whole", "fp32-isolated", "bf16-layer", "bf16-fp32")
MORE = ("bf16-whole", "bf16-isolated")
SLEEP = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
COLUMNS = {
    "case": "s",
    "documents a row": ".1f",
    "speedup (CPU time)": ".2f",
    "lowest": ".2f",
    "highest": ".2f",
    "speedup (clock)": ".2f",
    "peer tok/CPU-s": ".1f",
    "fastft tok/CPU-s": ".1f",
    "peer tok/s": ".1f",
    "fastft tok/s": ".1f",
    "peer GB": ".2f",
    "fastft GB": ".2f",
    "peer loss": ".4f",
    "fastft loss": ".4f",
    "load": ".1f",
}


def prepare(folder: Path, case: str, model: Path, dtype: str) -> Path:
    """Model, text and configuration of a case; returns the configuration."""
    import transformers

    from fastft import quickstart

    quickstart.write_corpus(folder / "corpus")
    if case == "bf16-layer":
        quickstart.write_base(folder / "model", folder / "corpus")
        config = transformers.AutoConfig.from_pretrained(model)
        small = transformers.AutoConfig.from_pretrained(folder / "model")
        config.num_hidden_layers, config.vocab_size = 1, -(-small.vocab_size // 64) * 64
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            setattr(config, name, getattr(small, name))
        transformers.set_seed(0)
        transformers.AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(folder / "model")
        model = folder / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    lines = (folder / "corpus/general.train.jsonl").read_text("utf-8").splitlines()
    text = "\n".join(json.loads(line)["text"] for line in lines)[: 40 * ROWS * LENGTH * 4]
    if case.endswith("whole"):
        texts = [text]  # cut into whole rows
    else:
        ids = tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
        texts = [tokenizer.decode(ids[at : at + 84]) for at in range(0, len(ids), 84)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), "utf-8")
    config = {
        "task": "causal_lm",
        "model": {"path": str(model), "dtype": dtype},
        "data": {"train": str(folder / "text.jsonl"), "max_length": LENGTH, "truncation": "split"},
        "batch": {"size": ROWS},
        "optim": {"lr": 1e-5, "schedule": "constant", "warmup": 0},
        "train": {"steps": 1000, "log_every": 1},
        "run": {"dir": str(folder / f"run-{dtype}"), "offline": True},
    }
    (folder / f"{dtype}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return folder / f"{dtype}.yaml"


def worker(path: Path, steps: int) -> None:
    """fastft's training loop, one step for each line of standard input; as peers/turns.py. Before that the batches that
    it will take, for Trainer.
    """
    from contextlib import ExitStack

    import numpy as np

    from fastft import config as configuration
    from fastft.bench.measure import _steps_only
    from fastft.ops import cpu
    from fastft.track import Telemetry
    from fastft.train import loop as training

    begun = time.process_time()
    with ExitStack() as cleanup:
        loop = training.build(_steps_only(configuration.load(path), steps), cleanup, steps_only=True)
        cleanup.callback(loop.open(Telemetry(path.parent, False, steps, [], 0)).close)
        loop.engine.train()
        found = {"ids": [], "labels": [], "positions": []}
        for step in range(steps):
            batches = loop.collate_step(step)[0]
            for name, of in (("ids", "input_ids"), ("positions", "position_ids")):
                found[name].append(np.concatenate([b.inputs[of].numpy() for b in batches]))
            found["labels"].append(np.concatenate([b.labels.numpy() for b in batches]))
        np.savez(path.parent / "batches.npz", **{name: np.stack(list_) for name, list_ in found.items()})
        starts = (np.stack(found["positions"]) == 0).sum()
        record = {name: loop.job.record.get(name) for name in ("attention", "layers")}
        record["cpu"] = cpu.describe()
        say(how=record, documents=float(starts) / (steps * ROWS), start_cpu=time.process_time() - begun)
        taken = loop.steps()
        while sys.stdin.readline():
            wall, spent = time.perf_counter(), time.process_time()
            loss = next(taken)
            loop.after_step(loss)
            wall, spent = time.perf_counter() - wall, time.process_time() - spent
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            say(wall=wall, cpu=spent, loss=float(loss), peak_gb=peak)


def say(**values) -> None:
    print("@" + json.dumps(values), flush=True)


class Process:
    """A contender that takes a step when it is told to."""

    def __init__(self, command: list[str], threads: int, log: Path):
        environment = {**os.environ, **SLEEP, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        self.log = log

    def read(self) -> dict:
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        raise SystemExit(f"{self.process.args} ended; its standard error is in {self.log}")

    def step(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.kill()  # what ends a run is not measured
        self.process.wait()


def measure(case: str, args) -> dict:
    """One row."""
    dtype = case.split("-")[0]
    steps = args.rounds + 1
    folder = Path(tempfile.mkdtemp(prefix="fastft-cpu-step-"))
    own = [sys.executable, str(Path(__file__).resolve()), "--worker", str(prepare(folder, case, args.model, dtype))]
    ours = Process([*own, str(steps)], args.threads, folder / "fastft.log")
    said = ours.read()
    print(f"{case}: {json.dumps(said)}", flush=True)
    if case == "bf16-fp32":
        config = prepare(folder, case, args.model, "fp32")
        peer = Process([*own[:3], str(config), str(steps)], args.threads, folder / "peer.log")
    else:
        spec = {
            "model": str(folder / "model" if case == "bf16-layer" else args.model),
            "dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
            "batches": str(folder / "batches.npz"),
            "isolated": not case.endswith("whole"),
            "folder": str(folder / "trainer"),
        }
        (folder / "spec.json").write_text(json.dumps(spec))
        command = [args.peers_python, str(ROOT / "benchmarks/peers/turns.py"), str(folder / "spec.json")]
        peer = Process(command, args.threads, folder / "peer.log")
    versions = peer.read()
    first = peer.step(), ours.step()  # not timed
    pairs, loads = [], []
    for i in range(args.rounds):
        turn = [peer, ours] if i % 2 == 0 else [ours, peer]
        taken = {process: process.step() for process in turn}
        pairs.append((taken[peer], taken[ours]))
        loads.append(os.getloadavg()[0])
        print(f"  {case} {i + 1}: CPU {pairs[-1][0]['cpu']:.2f} and {pairs[-1][1]['cpu']:.2f} s", flush=True)
    for process in (peer, ours):
        process.close()
    shutil.rmtree(folder)
    if abs(first[0]["loss"] - first[1]["loss"]) > 0.02 * first[0]["loss"]:
        raise SystemExit(f"{case}: first losses {first[0]['loss']} and {first[1]['loss']}: not the same step")
    ratios, clocks = ([one[key] / other[key] for one, other in pairs] for key in ("cpu", "wall"))
    row = {
        "case": case,
        "documents a row": said["documents"],
        "speedup (CPU time)": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "speedup (clock)": statistics.median(clocks),
        "load": statistics.median(loads),
        "how": said["how"],
        "start CPU-s": said["start_cpu"],
        "peer": versions.get("versions", "fastft, fp32"),
    }
    for at, name in enumerate(("peer", "fastft")):
        of = [pair[at] for pair in pairs]
        row |= {
            f"{name} tok/CPU-s": ROWS * LENGTH / statistics.median(step["cpu"] for step in of),
            f"{name} tok/s": ROWS * LENGTH / statistics.median(step["wall"] for step in of),
            f"{name} GB": of[-1]["peak_gb"],
            f"{name} loss": first[at]["loss"],
        }
    return row


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(Path(sys.argv[2]), int(sys.argv[3]))

    def more(parser):
        parser.add_argument("--model", type=Path, required=True, help="folder of a causal model")
        parser.add_argument("--peers-python", default=sys.executable, help="a Python that has transformers")
        parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES + MORE)

    args = common.arguments(__doc__.split("\n\n")[0], rounds=5, more=more)
    rows = [measure(case, args) for case in args.cases]
    for row in rows:
        print(json.dumps(row))
    if not args.quick:
        from fastft.ops import cpu

        of_all = (common.RESULTS / "cpu_step.jsonl").read_text().splitlines()
        here = {"machine": args.machine, "threads": args.threads}
        last = {row["case"]: row for row in map(json.loads, of_all) if {**row, **here} == row}
        last |= {row["case"]: row for row in rows}
        common.record("cpu_step", args, rows, COLUMNS, shown=list(last.values()), place=cpu.describe())


if __name__ == "__main__":
    main()
