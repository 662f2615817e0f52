"""Memory of ranks that load, train and export a model at ZeRO-3.

    python benchmarks/large.py [--ranks 1,2,4] [--starts float32,bfloat16,random] [--until load]
    python benchmarks/large.py --experts [--beside CHECKOUT]
    python benchmarks/large.py --beside CHECKOUT [--layers 6]

A Llama (18 layers, d_model 1,024, a vocabulary of 49,152; 331 M parameters, 1.3 GB in fp32) in a folder, in fp32 or in
bf16, or made from its config alone with random weights, is trained for two steps of fastft's own loop in fp32 and
exported. Each rank reads its anonymous memory (RssAnon of /proc/self/status; what is mapped from files is not in it,
and can be dropped by the kernel) every 5 ms. Given are the peaks of each phase of the worst rank, less what the same
phase takes with a model of two small layers (``base``), beside what the parts say: weights / ranks + 2 x the largest
module for loading; (weights + gradients + two moments) / ranks, DeepSpeed's bucket and the copy of it that is sent,
2 x the largest module and the activations for the step; for the checkpoint and the export, which find all of that in
memory, what is copied. The activations are those of `fastft plan`, which counts what autograd keeps of a forward.

--experts takes a Mixtral instead (6 layers of 8 experts, d_model 1,024, a vocabulary of 8,192; 249 M parameters), whose
files hold each expert by itself where the model has those of a layer as one tensor; the experts of a layer are its
largest module.

--beside has the ranks run the code of another checkout, with its extension built (python setup.py build_ext
--inplace), too: 2dda5fb, before ranks loaded their parts alone; with --experts d9319a2, before they did so of experts.
Ranks that leave the machine less than LEFT are ended, and the row says so.

Rows go to results/large.jsonl, the table to results/large.md; with --experts to large_experts, with --beside alone to
large_beside.
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
from importlib import metadata
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"vocab_size": 49152, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 18}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
EXPERTS = {"num_local_experts": 8, "num_experts_per_tok": 2}
MIXTRAL = {"vocab_size": 8192, "hidden_size": 1024, "intermediate_size": 1408, "num_hidden_layers": 6, **EXPERTS}
LEFT = 1_500_000_000  # bytes that must stay available to everyone else
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
    from fastft import config as configuration
    from fastft.cli import leave
    from fastft.train import export, loop

    sampler = Sampler()
    sampler.start()

    def end() -> None:
        out.with_name(f"{out.name}-{os.environ['RANK']}.json").write_text(json.dumps(sampler.peaks))
        leave(0)

    def marked(owner, name: str, before: str, after: str) -> None:
        plain = getattr(owner, name)

        def call(*args, **kwargs):
            sampler.enter(before)
            try:
                return plain(*args, **kwargs)
            finally:
                sampler.enter(after)
                if until == before:
                    end()

        setattr(owner, name, call)

    if hasattr(loop, "Loop"):
        from fastft import assemble
        from fastft.train import saver

        marked(assemble, "add_model", "load", "engine")
        marked(saver.Saver, "save", "checkpoint", "step")
        run, name = loop.Loop, "run"
    else:  # 2dda5fb
        from fastft.models import load

        marked(load, "build", "load", "engine")
        run, name = loop._Run, "loop"
        marked(run, "_save", "checkpoint", "step")
    marked(export, "save_engine", "export", "end")
    plain_run = getattr(run, name)

    def stepping(self):
        sampler.enter("step")
        return plain_run(self)

    setattr(run, name, stepping)
    loop.train(configuration.load(path))
    end()


def write_model(folder: Path, sizes: dict, dtype: str, tokenizer) -> int:
    import torch
    import transformers

    torch.manual_seed(0)
    heads = {"num_attention_heads": sizes["hidden_size"] // 64, "num_key_value_heads": sizes["hidden_size"] // 64}
    kind = transformers.MixtralConfig if "num_local_experts" in sizes else transformers.LlamaConfig
    config = kind(**sizes, **heads, max_position_embeddings=256, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
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


def settings(folder: Path, model: Path, name: str, old: bool) -> dict:
    data = {"train": str(folder / "text.jsonl"), "max_length": 64, "overlength" if old else "truncation": "split"}
    start = (
        {"path": str(model.with_name("float32")), "init": "random"} if model.name == "random" else {"path": str(model)}
    )
    return {
        "task": "causal_lm",
        "model": start,
        "data": data,
        "batch": {"size": 4, "micro": 1},
        "optim": {"lr": 1e-4},
        "train": {"steps": 2},
        "parallel": {"zero": 3},
        "checkpoint": {"every": None},
        "run": {"dir": str(folder / f"run-{name}"), "offline": True, "device": "cpu", "threads": 1},
    }


def peaks_of(folder: Path, config: dict, world: int, until: str, code: Path) -> dict[str, int]:
    """Largest of all ranks, by phase; {}: the machine had no memory for them."""
    import yaml

    run = Path(config["run"]["dir"])
    path, out = folder / f"{run.name}.yaml", folder / run.name.removeprefix("run-")
    path.write_text(yaml.safe_dump(config))
    command = [sys.executable, __file__, "--rank", str(path), str(out), until]
    env = {**os.environ, "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": "29611", "PYTHONPATH": str(code), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=sys.stderr)
        for r in range(world)
    ]
    full, begun = False, time.monotonic()
    try:
        while any(process.poll() is None for process in ranks):
            if full := full or _available() < LEFT:
                break
            assert time.monotonic() - begun < 1200 and not any(p.returncode for p in ranks), "a rank failed"
            time.sleep(0.05)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        shutil.rmtree(run, ignore_errors=True)  # checkpoints of 4 GB
    if full:
        return {}
    assert not any(process.returncode for process in ranks), "a rank failed"
    found = [json.loads(out.with_name(f"{out.name}-{r}.json").read_text()) for r in range(world)]
    return {phase: max(peaks.get(phase, 0) for peaks in found) for phase in PHASES}


def _available() -> int:
    with open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))


def parts_of(config: dict, sizes: dict, parameters: int, world: int) -> dict[str, int]:
    """What the parts say of each phase, and the activations and the largest module that are in them."""
    from fastft.config import validate
    from fastft.plan.configured import planned
    from fastft.zero.bucket import reduced_at_once

    weights = 4 * parameters
    inner = 3 * sizes["intermediate_size"] * sizes.get("num_local_experts", 1)
    largest = max(sizes["vocab_size"], inner) * sizes["hidden_size"] * 4
    plan = planned(validate(config), "cpu", world).plan
    activations = max(parts["activations"] + parts["logits"] for parts in plan.step.values())
    step = 4 * weights // world + 2 * 4 * reduced_at_once(parameters, largest // 4, True) + 2 * largest + activations
    parts = {"load": weights // world + 2 * largest, "engine": 0, "step": step}
    parts |= {"checkpoint": step + 3 * weights // world, "export": step + 2 * largest}
    return parts | {"activations": activations, "largest": largest, "weights": weights}


def measure(args: argparse.Namespace) -> None:
    codes = {"now": ROOT} | ({_commit(args.beside): Path(args.beside).resolve()} if args.beside else {})
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        folder = Path(name)
        text = "".join(json.dumps({"text": " ".join(f"w{(i * 7 + j) % 500}" for j in range(60))}) + "\n"
                       for i in range(32))  # fmt: skip
        (folder / "text.jsonl").write_text(text)
        tokenizer = tokens_of(500)
        small = SMALL | (EXPERTS if args.experts else {})
        sizes = MIXTRAL if args.experts else SIZES | {"num_hidden_layers": args.layers}
        sizes = small if args.quick else sizes
        write_model(folder / "tiny" / "float32", small, "float32", tokenizer)
        starts = args.starts.split(",")
        for dtype in {"random": "float32"}.get(starts[0], starts[0]), *starts:
            if dtype != "random" and not (folder / dtype).is_dir():
                parameters = write_model(folder / dtype, sizes, dtype, tokenizer)
        for world in map(int, args.ranks.split(",")):
            for code, where in codes.items():
                tag, old = f"{code}-{{}}-{world}", not (where / "fastft" / "assemble.py").is_file()
                tiny = settings(folder, folder / "tiny" / "float32", tag.format("tiny"), old)
                base = peaks_of(folder, tiny, world, args.until, where)
                for start in starts:
                    config = settings(folder, folder / start, tag.format(start), old)
                    peaks = peaks_of(folder, config, world, args.until, where)
                    parts = parts_of(settings(folder, folder / start, start, False), sizes, parameters, world)
                    rows = []
                    for phase in PHASES if args.until == "export" else PHASES[:1]:
                        row = {"code": code, "ranks": world, "start": start, "phase": phase}
                        row |= {"peak": peaks.get(phase), "base": base.get(phase), "parts": parts[phase]}
                        rows.append(row | {part: parts[part] for part in ("activations", "largest", "weights")})
                    record(args, rows)
                    shown = {p: round((peaks[p] - base[p]) / 1e6) for p in PHASES} if peaks and base else "no memory"
                    print(code, world, start, shown, file=sys.stderr)


def _commit(checkout: str) -> str:
    return subprocess.run(
        ["git", "-C", checkout, "rev-parse", "--short", "HEAD"], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()


def markdown(rows: list[dict], name: str) -> str:
    one = rows[-1]
    out = [
        f"# {name}",
        "",
        "Written by `python benchmarks/large.py`, which says how. Peak anonymous memory (RssAnon) of the worst rank,",
        "in MB, less that of the same phase with a tiny model (base); training in fp32 at ZeRO 3.",
        "",
        f"Weights {one['weights'] / 1e6:,.0f} MB in fp32, largest module {one['largest'] / 1e6:,.0f} MB, activations",
        f"{one['activations'] / 1e6:,.0f} MB by `fastft plan`. {one['machine']}, {one['versions']}.",
        "",
        "Parts: of loading, weights over the ranks and twice the largest module; of a step, gradients and two moments",
        "over the ranks besides, the bucket for reductions twice, and the activations. The checkpoint (a copy of",
        "weights and moments) and the export (two of the largest module) find what training holds in memory.",
        "",
        "| code | ranks | weights | phase | peak | parts | | base | measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = [row["code"], str(row["ranks"]), row["start"], row["phase"]]
        if row["peak"] is None or row["base"] is None:
            shown = ["no memory for the ranks here", "-", "-", "-"]
        else:
            own, parts = row["peak"] - row["base"], row["parts"]
            said = "-" if not parts else "reached" if own <= parts else "missed"
            shown = [f"{own / 1e6:,.0f}", f"{parts / 1e6:,.0f}" if parts else "-", said, f"{row['base'] / 1e6:,.0f}"]
        out.append(f"| {' | '.join([*name, *shown, row['date']])} |")
    return "\n".join(out) + "\n"


def record(args: argparse.Namespace, rows: list[dict]) -> None:
    """Rows as they come: a machine may be gone before the last one. The table has the newest of each."""
    if args.quick:
        return
    versions = ", ".join(f"{n} {metadata.version(n)}" for n in ("torch", "transformers", "deepspeed"))
    run = {"date": time.strftime("%Y-%m-%d"), "machine": args.machine, "versions": versions}
    name = "large_experts" if args.experts else "large_beside" if args.beside else "large"
    with open(common.RESULTS / f"{name}.jsonl", "a") as file:
        file.writelines(json.dumps({**run, **row}) + "\n" for row in rows)
    keys = ("ranks", "start", "code", "phase")
    newest: dict[tuple, dict] = {}
    for line in (common.RESULTS / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "file" in row:  # before there were random starts; the activations were not among the parts
            activations = rows[0]["activations"]
            row |= {"code": "now", "start": row["file"], "activations": activations}
            row["parts"] += activations * (row["phase"] not in ("load", "engine"))
        if row["weights"] == rows[0]["weights"]:
            newest[tuple(row[key] for key in keys)] = row
    order = lambda key: (key[0], key[1], key[2] != "now", PHASES.index(key[3]))
    (common.RESULTS / f"{name}.md").write_text(markdown([newest[key] for key in sorted(newest, key=order)], name))


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--ranks", default="1,2,4")
        parser.add_argument("--starts", default="float32,bfloat16,random")
        parser.add_argument("--layers", type=int, default=SIZES["num_hidden_layers"])
        parser.add_argument("--experts", action="store_true", help="a mixture of experts")
        parser.add_argument("--until", choices=["load", "export"], default="export", help="where to stop")
        parser.add_argument("--beside", metavar="CHECKOUT", help="a worktree of an older commit")
        parser.add_argument("--scratch", metavar="FOLDER", help="for models and checkpoints: 10 GB")

    measure(common.arguments(__doc__.splitlines()[0], rounds=1, more=more))


if __name__ == "__main__":
    main()
