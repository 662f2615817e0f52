"""Whole training steps on a GPU: fastft beside Hugging Face Trainer (decoders: with Liger's kernels), on the same
model shape, text, tokens a step and precision.

    python benchmarks/gpu_step.py [--shapes llama-1.1b qwen2-0.5b bert-base] [--contenders NAME ...] [--warmup 40]
    [--steps 30] [--documents TOKENS] [--profile] [--out FILE] [--folder FOLDER] [--limit SECONDS] [--tiny]

Every contender is a process of its own, with weights drawn at random in bf16 and AdamW, without activation
checkpointing. Decoders: 8 sequences of 2,048 tokens in one micro-step; fastft packs whole documents that cannot see
each other, Trainer's rows are cut from one stream, as its users do it, and every token sees all before it. The text is
what any Python carries (as in `fastft quickstart`): long documents, most rows are one. --documents: the same text cut
into documents of that many tokens on average, their lengths drawn as those of web pages are (log-normal; 700 is about
FineWeb's mean). The encoder classifies 128 rows a step of 8 to 500 tokens (log-normal, 100 on average), its measured
steps are one epoch; tokens/s are of real tokens. Rows go to FILE as they come; a contender that fails is a row with its
error. --profile prints where a step's GPU time goes, by kernel. --tiny: small models, to show on a CPU that all of it
runs.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LENGTH, SEQUENCES = 2048, 8
SHAPES = {
    "llama-1.1b": (
        "Llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        },
    ),
    "qwen2-0.5b": (
        "Qwen2",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "bert-base": ("Bert", {"vocab_size": 30522}),
    "tiny": (
        "Llama",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 4096,
        },
    ),
    "tiny-bert": (
        "Bert",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "vocab_size": 4096,
        },
    ),
}
ROWS, CLASSES = 5120, 10  # of the encoder
FASTFT = {  # overrides of the configuration
    "fastft": [],
    # 8 bytes a parameter, as Trainer with bf16 weights
    "fastft, Trainer's state": ["optim.master=stochastic", "optim.state_dtype=bf16"],
    "fastft, ZeRO 0, masters": ["optim.master=fp32"],
    "fastft, ZeRO 1": ["parallel.zero=1"],
    "fastft, ZeRO 2": ["parallel.zero=2"],
    "fastft, ZeRO 3": ["parallel.zero=3"],
    "fastft, plain layers": ["model.layers=plain"],
    "fastft, as before": ["parallel.zero=1", "model.attention=sdpa"],
    "fastft, padded": ["model.attention=sdpa"],
}
TRAINER = {
    "Trainer + Liger, bf16 weights": {"dtype": "bfloat16", "liger": True},
    "Trainer + Liger, autocast": {"dtype": "float32", "liger": True},
    "Trainer, bf16 weights": {"dtype": "bfloat16", "liger": False},
    "Trainer, autocast": {"dtype": "float32", "liger": False},
    "Trainer, bf16 weights, by length": {"dtype": "bfloat16", "liger": False, "group_by_length": True},
}
USUAL = ["fastft", "Trainer + Liger, bf16 weights"]
USUAL_ENCODER = ["fastft", "Trainer, autocast", "Trainer, bf16 weights, by length"]


def cut(texts: list[str], tokenizer, mean: int) -> list[str]:
    """The same text in documents whose tokens are log-normal with that mean and sigma 1."""
    ids = list(itertools.chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"]))
    lengths = np.random.default_rng(0).lognormal(np.log(mean) - 0.5, 1.0, 4 * len(ids) // mean).astype(int) + 1
    ends = np.cumsum(lengths)
    return [tokenizer.decode(part) for part in np.split(ids, ends[ends < len(ids)])]


def prepare(folder: Path, shape: str, documents: int | None = None) -> Path:
    """Model folder (configuration and tokenizer), texts, the same as tokens for Trainer; returns a configuration."""
    import transformers

    from fastft import quickstart

    where = folder / (f"{shape}-{documents}" if documents else shape)
    if not (where / "run.yaml").is_file():
        quickstart.write_corpus(where / "corpus")
        quickstart.write_base(where / "model", where / "corpus")
        tokenizer = transformers.AutoTokenizer.from_pretrained(where / "model")
        family, sizes = SHAPES[shape]
        encoder = family == "Bert"
        config = getattr(transformers, f"{family}Config")(
            **sizes,
            max_position_embeddings=512 if encoder else LENGTH,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            architectures=[f"{family}ForSequenceClassification" if encoder else f"{family}ForCausalLM"],
        )
        config.save_pretrained(where / "model")
        files = [where / "corpus" / f"{name}.train.jsonl" for name in ("general", "domain")]
        texts = [json.loads(line)["text"] for file in files for line in file.read_text("utf-8").splitlines()]
        if encoder:
            run = classified(where, texts, tokenizer)
        else:
            run = packed(where, texts, tokenizer, documents, 128 if shape == "tiny" else LENGTH)
        run |= {
            "model": {"path": str(where / "model"), "init": "random", "dtype": "bf16"},
            "optim": {"lr": 1e-4, "schedule": "constant"},
            "train": {"epochs": 100, "log_every": 10},
            "run": {"dir": str(where / "run"), "offline": True},
            "parallel": {"verify_every": None},
        }
        (where / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    return where / "run.yaml"


def packed(where: Path, texts: list[str], tokenizer, documents: int | None, length: int) -> dict:
    if documents:
        texts = cut(texts, tokenizer, documents)
    write(where / "train.jsonl", [{"text": text} for text in texts])
    flat: list[int] = []
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        flat += [*ids, tokenizer.eos_token_id]
    rows = np.array(flat[: len(flat) // length * length], dtype=np.int32).reshape(-1, length)
    np.save(where / "rows.npy", np.random.default_rng(0).permutation(rows))
    data = {"train": str(where / "train.jsonl"), "max_length": length, "truncation": "split"}
    return {"task": "causal_lm", "data": data, "batch": {"size": SEQUENCES}}


def classified(where: Path, texts: list[str], tokenizer) -> dict:
    generator = np.random.default_rng(0)
    ids = list(itertools.chain.from_iterable(tokenizer(texts, verbose=False)["input_ids"]))
    sizes = np.clip(generator.lognormal(np.log(100) - 0.5, 1.0, ROWS), 8, 500).astype(int)
    begins = generator.integers(0, len(ids) - 500, ROWS)
    parts = [tokenizer.decode(ids[at : at + n]) for at, n in zip(begins, sizes, strict=True)]
    labels = generator.integers(0, CLASSES, ROWS).tolist()
    write(where / "train.jsonl", [{"text": t, "label": f"c{c}"} for t, c in zip(parts, labels, strict=True)])
    encoded = tokenizer(parts, truncation=True, max_length=510)["input_ids"]
    write(where / "rows.jsonl", [{"input_ids": row, "labels": c} for row, c in zip(encoded, labels, strict=True)])
    data = {"train": str(where / "train.jsonl"), "max_length": 510, "truncation": "truncate"}
    return {"task": "classification", "data": data, "batch": {"size": 128}}


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def of_fastft(config: Path, overrides: list[str], warmup: int, steps: int, limit: float) -> dict:
    command = [sys.executable, "-m", "fastft", "bench", str(config), *overrides]
    report = json.loads(run([*command, "--warmup", str(warmup), "--steps", str(steps), "--json"], limit))
    losses = report["losses"]
    return {
        "tokens_per_second": report["tokens_per_second"]["mean"],
        "spread": [report["tokens_per_second"][name] for name in ("min", "median", "max")],
        "step_ms": [round(s * 1e3, 1) for s in report["step_seconds"]["each"]],
        "padding": report["padding"],
        "peak_gib": report["peak_memory"] / 2**30,
        "start_s": report["start_seconds"],
        "host_ms": report["host_seconds"] * 1e3,
        "parts_ms": {name: round(part["median"] * 1e3, 2) for name, part in report["parts"].items()},
        "losses": [round(float(np.mean(losses[at : at + 10])), 4) for at in range(0, len(losses), 10)],
        "ceilings": report["ceilings"],
        "utilization": report["flops"]["utilization"],
        "how": {name: report["model"].get(name) for name in ("attention", "layers")},
        "device": report["machine"]["device"],
    }


def of_trainer(config: Path, settings: dict, warmup: int, steps: int, limit: float) -> dict:
    encoder = (config.parent / "rows.jsonl").is_file()
    rows = config.parent / ("rows.jsonl" if encoder else "rows.npy")
    spec = {
        **settings,
        "kind": "encoder" if encoder else "decoder",
        "labels": CLASSES,
        "model": str(config.parent / "model"),
        "rows": str(rows),
        "sequences": json.loads(config.read_text())["batch"]["size"],
        "warmup": warmup,
        "steps": steps,
        "folder": str(config.parent / "trainer"),
    }
    if encoder:
        tokens = sum(len(json.loads(line)["input_ids"]) for line in rows.read_text("utf-8").splitlines())
        tokens *= steps * spec["sequences"] / ROWS
    else:
        tokens = steps * spec["sequences"] * np.load(rows).shape[1]
    found = config.parent / "spec.json"
    found.write_text(json.dumps(spec))
    report = json.loads(run([sys.executable, str(ROOT / "benchmarks/peers/steps.py"), str(found)], limit))
    return {"tokens_per_second": tokens / report.pop("seconds"), **report}


def run(command: list[str], limit: float) -> str:
    """The last line that it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
    if done.returncode:
        raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()[-1500:]}")
    return done.stdout.strip().splitlines()[-1]


def profile(config: Path, overrides: list[str]) -> None:
    """Where the GPU time of two steps goes, by kernel."""
    from contextlib import ExitStack

    import torch

    from fastft import config as configuration
    from fastft.bench.measure import _steps_only
    from fastft.track import Telemetry
    from fastft.train import loop as training

    with ExitStack() as cleanup:
        loop = training.build(_steps_only(configuration.load(config, overrides), 12), cleanup, steps_only=True)
        cleanup.callback(loop.open(Telemetry(config.parent, False, 12, [], 0)).close)
        loop.engine.train()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        watch = torch.profiler.profile(activities=activities[: 2 if torch.cuda.is_available() else 1])
        for loss in loop.steps():
            loop.after_step(loss)
            if loop.step == 8:
                watch.__enter__()
                begun = time.perf_counter()
            if loop.step == 10:
                break
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - begun) / 2
        watch.__exit__(None, None, None)
    found = watch.key_averages()
    kernels = [k for k in found if "cuda" in str(k.device_type).lower()]
    busy = sum(k.self_device_time_total for k in kernels) / 2e3
    print(f"{overrides}: a step takes {seconds * 1e3:.1f} ms (profiled); kernels {busy:.1f} ms")
    for k in sorted(kernels, key=lambda k: -k.self_device_time_total)[:45]:
        print(f"{k.self_device_time_total / 2e3:9.3f} ms {k.count / 2:7.1f} x  {k.key[:110]}")
    print("host, by operator")
    for k in sorted(found, key=lambda k: -k.self_cpu_time_total)[:25]:
        print(f"{k.self_cpu_time_total / 2e3:9.3f} ms {k.count / 2:7.1f} x  {k.key[:110]}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["llama-1.1b", "qwen2-0.5b"], choices=[*SHAPES])
    parser.add_argument("--contenders", nargs="+", choices=[*FASTFT, *TRAINER])
    # Attention builds a graph when a step has more documents than those before; of the encoder 40 are an epoch.
    parser.add_argument("--warmup", type=int, default=40, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--documents", type=int, metavar="TOKENS")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu/step.jsonl")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/gpu/step")
    parser.add_argument("--limit", type=float, default=60, help="seconds for one contender")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    missing = 0
    for shape in ["tiny", "tiny-bert"] if args.tiny else args.shapes:
        encoder = SHAPES[shape][0] == "Bert"
        config = prepare(args.folder, shape, args.documents)
        if args.profile:
            for name in args.contenders or USUAL[:1]:
                if name in FASTFT:
                    profile(config, FASTFT[name])
            continue
        steps = ROWS // 128 if encoder and not args.tiny else args.steps  # one epoch: its tokens are known
        for name in args.contenders or (USUAL_ENCODER if encoder else USUAL):
            row = {"shape": shape, "contender": name, "documents": args.documents, "date": time.strftime("%Y-%m-%d")}
            try:
                if name in FASTFT:
                    row |= of_fastft(config, FASTFT[name], args.warmup, steps, args.limit)
                else:
                    row |= of_trainer(config, TRAINER[name], args.warmup, steps, args.limit)
                print(
                    f"{shape:12} {name:32} {row['tokens_per_second']:9.0f} tokens/s {row['peak_gib']:6.1f} GiB",
                    flush=True,
                )
            except (RuntimeError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
                row["error"] = f"{type(error).__name__}: {error}"
                missing += 1
                print(f"{shape:12} {name:32} FAILED {row['error'][-1200:]}", flush=True)
            with open(args.out, "a") as file:
                file.write(json.dumps(row) + "\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
