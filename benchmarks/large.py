"""Memory of ranks that load, train and export a model at ZeRO-3.

    python benchmarks/large.py [--ranks 1,2,4] [--until load]

A Llama with random weights (18 layers, d_model 1,024, a vocabulary of 49,152; 331 M parameters, 1.3 GB in fp32) in a
folder, in fp32 or in bf16, is trained for two steps of fastft's own loop in fp32 and exported. Each rank reads its
anonymous memory (RssAnon of /proc/self/status; what is mapped from files is not in it, and can be dropped by the
kernel) every 5 ms. Given are the peaks of each phase of the worst rank, less what the same phase takes with a model of
two small layers (``base``), beside what the parts say: weights / ranks + 2 x the largest module for loading; (weights +
gradients + two moments) / ranks, DeepSpeed's bucket and the copy of it that is sent, and 2 x the largest module for the
step, on whose top are activations; for the checkpoint and the export, which find all of that in memory, what is copied.

Rows go to results/large.jsonl, the table to results/large.md.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

import common

from fastft.zero.bucket import reduced_at_once

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"vocab_size": 49152, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
PHASES = ("load", "engine", "step", "checkpoint", "export")


class Sampler(threading.Thread):
    """The peak of RssAnon in each phase, bytes."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks: dict[str, int] = {}
        self.phase = "start"

    def run(self) -> None:
        while True:
            self.read()
            time.sleep(0.005)

    def read(self) -> None:
        now = common.status("RssAnon:")
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), now)

    def enter(self, phase: str) -> None:
        self.read()
        self.phase = phase
        self.read()


def rank(path: Path, out: Path, until: str) -> None:
    """One rank: the run of a configuration, by fastft's own functions, with phases between them."""
    from fastft import assemble
    from fastft import config as configuration
    from fastft.cli.main import leave
    from fastft.train import export, loop, saver

    sampler = Sampler()
    sampler.start()

    def end() -> None:
        out.with_name(f"{out.name}-{os.environ['RANK']}.json").write_text(json.dumps(sampler.peaks))
        leave(0)

    def marked(module, name: str, before: str, after: str) -> None:
        plain = getattr(module, name)

        def call(*args, **kwargs):
            sampler.enter(before)
            try:
                return plain(*args, **kwargs)
            finally:
                sampler.enter(after)
                if until == before:
                    end()

        setattr(module, name, call)

    marked(assemble, "add_model", "load", "engine")
    marked(saver.Saver, "save", "checkpoint", "step")
    marked(export, "save_engine", "export", "end")
    plain_run = loop.Loop.run

    def run(self):
        sampler.enter("step")
        return plain_run(self)

    loop.Loop.run = run
    with ExitStack():
        loop.train(configuration.load(path))
    end()


def write_model(folder: Path, sizes: dict, dtype: str, tokenizer) -> int:
    import torch
    import transformers

    torch.manual_seed(0)
    heads = {"num_attention_heads": sizes["hidden_size"] // 64, "num_key_value_heads": sizes["hidden_size"] // 64}
    config = transformers.LlamaConfig(**sizes, **heads, max_position_embeddings=256, tie_word_embeddings=False)
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def tokens_of(words: int):
    """A tokenizer of so many whole words."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1} | {f"w{i}": i + 2 for i in range(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="[UNK]")


def peaks_of(folder: Path, model: Path, world: int, name: str, until: str) -> dict[str, int]:
    """Largest of all ranks, by phase."""
    import yaml

    config = {
        "task": "causal_lm",
        "model": {"path": str(model)},
        "data": {"train": str(folder / "text.jsonl"), "max_length": 64, "truncation": "split"},
        "batch": {"size": 4, "micro": 1},
        "optim": {"lr": 1e-4},
        "train": {"steps": 2},
        "parallel": {"zero": 3},
        "checkpoint": {"every": None},
        "run": {"dir": str(folder / f"run-{name}"), "offline": True, "device": "cpu", "threads": 1},
    }
    path, out = folder / f"{name}.yaml", folder / name
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, __file__, "--rank", str(path), str(out), until]
    env = {**os.environ, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": "29611", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=sys.stderr)
        for r in range(world)
    ]
    assert not [process for process in ranks if process.wait(900)], "a rank failed"
    shutil.rmtree(config["run"]["dir"])  # checkpoints of 4 GB
    found = [json.loads(out.with_name(f"{out.name}-{r}.json").read_text()) for r in range(world)]
    return {phase: max(peaks.get(phase, 0) for peaks in found) for phase in PHASES}


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = "".join(json.dumps({"text": " ".join(f"w{(i * 7 + j) % 500}" for j in range(60))}) + "\n"
                       for i in range(32))  # fmt: skip
        (folder / "text.jsonl").write_text(text)
        tokenizer = tokens_of(500)
        sizes = SMALL if args.quick else SIZES
        write_model(folder / "tiny", SMALL, "float32", tokenizer)
        parameters = {d: write_model(folder / d, sizes, d, tokenizer) for d in ("float32", "bfloat16")}["float32"]
        largest = max(sizes["vocab_size"], 3 * sizes["intermediate_size"]) * sizes["hidden_size"] * 4
        for world in map(int, args.ranks.split(",")):
            base = peaks_of(folder, folder / "tiny", world, f"tiny-{world}", args.until)
            for dtype in ("float32", "bfloat16"):
                peaks = peaks_of(folder, folder / dtype, world, f"{dtype}-{world}", args.until)
                weights = parameters * 4
                bucket = 4 * reduced_at_once(parameters, largest // 4, True)
                step = 4 * weights // world + 2 * bucket + 2 * largest
                allowed = {"load": weights // world + 2 * largest, "engine": 0, "step": step}
                allowed |= {"checkpoint": step + 3 * weights // world, "export": step + 2 * largest}
                for phase in PHASES if args.until == "export" else PHASES[:1]:
                    row = {"ranks": world, "file": dtype, "phase": phase, "peak": peaks[phase], "base": base[phase]}
                    rows.append(row | {"parts": allowed[phase], "weights": weights, "largest": largest})
                print(world, dtype, {p: round((peaks[p] - base[p]) / 1e6) for p in PHASES}, file=sys.stderr)
    return rows


def markdown(rows: list[dict], run: dict) -> str:
    one = rows[0]
    out = [
        "# large",
        "",
        "Written by `python benchmarks/large.py`, which says how. Peak anonymous memory (RssAnon) of the worst rank,",
        "in MB, less that of the same phase with a tiny model (base); training in fp32 at ZeRO 3.",
        "",
        f"Weights {one['weights'] / 1e6:,.0f} MB in fp32, largest module {one['largest'] / 1e6:,.0f} MB.",
        f"{run['machine']}, {run['date']}, {run['versions']}.",
        "",
        "Parts: of loading, weights over the ranks and twice the largest module; of a step, gradients and two moments",
        "over the ranks besides, and the bucket for reductions twice; activations come on top. The checkpoint (a copy",
        "of weights and moments) and the export (two of the largest module) find what training holds in memory.",
        "",
        "| ranks | weights in the folder | phase | peak | parts | base |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        own, parts, base = ((row["peak"] - row["base"]) / 1e6, row["parts"] / 1e6, row["base"] / 1e6)
        shown = f"{parts:,.0f}" if parts else "-"
        out.append(f"| {row['ranks']} | {row['file']} | {row['phase']} | {own:,.0f} | {shown} | {base:,.0f} |")
    return "\n".join(out) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--ranks", default="1,2,4")
        parser.add_argument("--until", choices=["load", "export"], default="export", help="where to stop")

    args = common.arguments(__doc__.splitlines()[0], rounds=1, more=more)
    rows = measure(args)
    if args.quick:
        return
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers", "deepspeed"))
    run = {"date": time.strftime("%Y-%m-%d"), "machine": args.machine, "versions": versions}
    with open(common.RESULTS / "large.jsonl", "a") as file:
        file.writelines(json.dumps({**run, **row}) + "\n" for row in rows)
    (common.RESULTS / "large.md").write_text(markdown(rows, run))


if __name__ == "__main__":
    main()
