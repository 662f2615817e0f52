"""The memory that `fastft plan` says beside what real runs take on a CPU, by Linux's account of each process.

    python benchmarks/plan_memory.py [--cases NAME ...] [--raw FILE] [--quick] [--machine NAME]

Each case is a whole run of fastft in processes of its own: loading, checks, three steps, a checkpoint, the export.
Models of 75 and 135 M parameters are made here, and a Mixtral of 119 M (8 experts to a layer). `process` is what a run
of a model of nothing takes (Python, torch, transformers, DeepSpeed): it is measured in the same way, added to the plan,
and left out in the errors of the second kind. Errors are positive where the plan is too large.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import common

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3
MODELS = {
    "nothing": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True},
    "75M": {"hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 14, "num_attention_heads": 10,
            "num_key_value_heads": 5, "vocab_size": 16384, "tie_word_embeddings": True},
    "135M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
             "num_key_value_heads": 12, "vocab_size": 32768, "tie_word_embeddings": False},
    "experts": {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8,
                "num_key_value_heads": 8, "vocab_size": 8192, "tie_word_embeddings": False, "num_local_experts": 8},
}  # fmt: skip
BF16 = ("model.dtype=bf16",)
LORA = ("model.lora={r: 16}",)
# name -> model, ranks, overrides; a step is `batch.size` sequences of 512 tokens
CASES = {
    "process": ("nothing", 1, ()),
    "process, 2 ranks": ("nothing", 2, ("parallel.zero=1",)),
    "stage 0": ("75M", 1, ()),
    "stage 0, 135 M": ("135M", 1, ()),
    "stage 0, 4 rows at once": ("75M", 1, ("batch.micro=4", "batch.size=4")),
    "stage 0, rows of 1,024": ("75M", 1, ("data.max_length=1024",)),
    "stage 0, accumulation": ("75M", 1, ("batch.size=4",)),
    "stage 0, plain layers": ("75M", 1, ("model.layers=plain",)),
    "stage 0, attention by mask": ("75M", 1, ("model.attention=sdpa",)),
    "stage 0, checkpointing": ("75M", 1, ("batch.micro=4", "batch.size=4", "parallel.activation_checkpointing=true")),
    "stage 0, all logits": ("75M", 1, ("loss.implementation=cross_entropy",)),
    "stage 0, bf16": ("75M", 1, BF16),
    "stage 0, int8 state": ("135M", 1, ("optim.state_dtype=int8",)),
    "LoRA": ("135M", 1, LORA),
    "LoRA, 4 rows at once": ("75M", 1, (*LORA, "batch.micro=4", "batch.size=4")),
    "stage 1": ("75M", 1, ("parallel.zero=1",)),
    "stage 2, bf16": ("135M", 1, ("parallel.zero=2", *BF16)),
    "stage 3": ("75M", 1, ("parallel.zero=3",)),
    "2 ranks, stage 0": ("75M", 2, ("batch.size=2",)),
    "2 ranks, stage 1": ("75M", 2, ("parallel.zero=1", "batch.size=2")),
    "2 ranks, stage 2": ("75M", 2, ("parallel.zero=2", "batch.size=2")),
    "2 ranks, stage 2, 135 M": ("135M", 2, ("parallel.zero=2", "batch.size=2")),
    "2 ranks, stage 3": ("75M", 2, ("parallel.zero=3", "batch.size=2")),
    "2 ranks, stage 3, 135 M": ("135M", 2, ("parallel.zero=3", "batch.size=2")),
    "2 ranks, stage 1, LoRA": ("75M", 2, ("parallel.zero=1", "batch.size=2", *LORA)),
    "stage 1, offload": ("75M", 1, ("parallel.zero=1", "parallel.offload=optimizer")),
    "stage 3, offload": ("75M", 1, ("parallel.zero=3", "parallel.offload=parameters")),
    "LoRA, NF4": ("135M", 1, (*LORA, "model.quantize=nf4")),
    "LoRA, NF4 by 48 rows": ("135M", 1, (*LORA, "model.quantize={format: nf4, calibrate: 48}")),
    "experts, stage 0": ("experts", 1, ()),
    "experts, checkpointing": ("experts", 1, ("parallel.activation_checkpointing=true",)),
    "experts, stage 3": ("experts", 1, ("parallel.zero=3",)),
    "2 ranks, stage 3, experts": ("experts", 2, ("parallel.zero=3", "batch.size=2")),
    "2 ranks to a sequence": ("75M", 2, ("parallel.zero=1", "parallel.sequence=2", "data.max_length=1024")),
}
QUICK = ("process", "stage 0")
COLUMNS = {
    "case": "s",
    "model": "s",
    "weights": ".2f",
    "gradients": ".2f",
    "optimizer": ".2f",
    "activations": ".2f",
    "logits": ".2f",
    "buckets": ".2f",
    "heap": ".2f",
    "process": ".2f",
    "training planned": ".2f",
    "training measured": ".2f",
    "error": "+.1%",
    "error without process": "+.1%",
    "run planned": ".2f",
    "run measured": ".2f",
    "error of run": "+.1%",
}


def prepare(folder: Path) -> None:
    """Models with a tokenizer, text, and the configuration that cases change."""
    import transformers

    from fastft import quickstart

    quickstart.write_corpus(folder / "corpus")
    quickstart.write_base(folder / "tokenizer", folder / "corpus")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, sizes in MODELS.items():
        transformers.set_seed(0)
        kind = transformers.MixtralConfig if "num_local_experts" in sizes else transformers.LlamaConfig
        config = kind(max_position_embeddings=2048, **sizes, **tokens)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = (folder / "corpus/general.train.jsonl").read_text("utf-8").splitlines()
    (folder / "text.jsonl").write_text("\n".join(lines[:200]) + "\n", "utf-8")
    config = {
        "task": "causal_lm",
        "model": {"path": "set by the case"},
        "data": {"train": str(folder / "text.jsonl"), "max_length": 512, "truncation": "split"},
        "batch": {"size": 1, "micro": 1},
        "optim": {"lr": 1e-5, "schedule": "constant"},
        "train": {"steps": STEPS, "log_every": 1},
        "run": {"offline": True, "device": "cpu", "threads": 2},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML


def resident() -> int:
    """Bytes that this process has had at most."""
    return common.status("VmHWM:")


def worker(path: Path, overrides: list[str]) -> None:
    """A whole run; says what it had taken after each of its parts."""
    from contextlib import ExitStack

    from fastft import config as configuration
    from fastft.track import Telemetry
    from fastft.train import loop as training

    config = configuration.load(path, overrides)
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    found: dict[str, int] = {}
    with ExitStack() as cleanup:
        loop = training.build(config, cleanup)
        found["built"] = resident()
        cleanup.callback(loop.open(Telemetry(Path(config.run.dir), loop.job.ranks.main, STEPS, [], 0)).close)

        def mark(part: str) -> None:
            found[f"{part} {loop.step + 1}"] = found["training"] = resident()

        loop.mark = mark
        loop.run()
        found["run"] = resident()
        record = {name: loop.job.record.get(name) for name in ("attention", "layers", "loss")}
        print("@" + json.dumps({**found, "how": record}), flush=True)


def run(folder: Path, name: str) -> list[dict]:
    """What each rank of a case took."""
    _, ranks, _ = CASES[name]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = [sys.executable, str(Path(__file__).resolve()), "--worker", str(folder / "config.yaml")]
    command = [*own, *case(folder, name)]
    processes = []
    for rank in range(ranks):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "LOCAL_SIZE": ranks,
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": ROOT}  # fmt: skip
        env = {**os.environ, **{key: str(value) for key, value in places.items()}, "HF_HUB_OFFLINE": "1"}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise SystemExit(f"{name}: {errors[-3000:]}")
    return [json.loads(line[1:]) for out, _ in outputs for line in out.splitlines() if line.startswith("@")]


def case(folder: Path, name: str) -> list[str]:
    """The overrides of a case."""
    model, ranks, overrides = CASES[name]
    threads = f"run.threads={2 // ranks}"
    return [f"model.path={folder / model}", f"run.dir={folder / 'runs' / name.replace(' ', '-')}", threads, *overrides]


def row(folder: Path, name: str, ranks: list[dict], process: dict[int, int]) -> dict:
    """A case's plan beside what it took."""
    from fastft import config as configuration
    from fastft.plan.configured import planned

    model, world, _ = CASES[name]
    plan = planned(configuration.load(folder / "config.yaml", case(folder, name)), "cpu", world).plan
    base = process[world]
    training, whole = max(rank["training"] for rank in ranks), max(rank["run"] for rank in ranks)
    gb = {part: size / 1e9 for part, size in plan.parts.items()}
    return {
        "case": name,
        "model": model,
        **gb,
        "process": base / 1e9,
        "training planned": (plan.training + base) / 1e9,
        "training measured": training / 1e9,
        "error": (plan.training + base) / training - 1,
        "error without process": plan.training / (training - base) - 1,
        "run planned": (plan.peak + base) / 1e9,
        "run measured": whole / 1e9,
        "error of run": (plan.peak + base) / whole - 1,
        "moments": {moment: sum(parts.values()) for moment, parts in {**plan.step, **plan.around}.items()},
        "measured": ranks,
    }


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        return worker(Path(sys.argv[2]), sys.argv[3:])

    def more(parser):
        parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
        parser.add_argument("--raw", type=Path, help="what runs took, by case: those in it are not run again")

    args = common.arguments(__doc__.split("\n\n")[0], rounds=1, more=more)
    wanted = QUICK if args.quick else args.cases
    names = list(dict.fromkeys([*(n for n in CASES if n.startswith("process") and not args.quick), *wanted]))
    rows, process, known = [], {}, {}
    if args.raw and args.raw.exists():
        known = {found["case"]: found["ranks"] for found in map(json.loads, args.raw.read_text().splitlines())}
    with tempfile.TemporaryDirectory(prefix="fastft-plan-memory-") as scratch:
        folder = Path(scratch)
        prepare(folder)
        for name in names:
            taken = known.get(name) or run(folder, name)
            if args.raw and name not in known:
                with open(args.raw, "a") as file:
                    file.write(json.dumps({"case": name, "ranks": taken}) + "\n")
            if name.startswith("process"):
                process[CASES[name][1]] = max(rank["training"] for rank in taken)
                print(name, json.dumps(taken), flush=True)
                continue
            rows.append(row(folder, name, taken, process))
            print(json.dumps(rows[-1]), flush=True)
    near = sum(abs(r["error"]) <= 0.1 for r in rows)
    print(f"{near} of {len(rows)} within 10 %")
    common.record("plan_memory", args, rows, COLUMNS)


if __name__ == "__main__":
    main()
