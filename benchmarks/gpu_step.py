"""Whole training steps on a GPU: fastft beside Hugging Face Trainer with Liger's kernels, on the same model shape,
text, tokens a step and precision.

    python benchmarks/gpu_step.py [--shapes llama-1.1b qwen2-0.5b] [--contenders NAME ...] [--steps 30] [--profile]
    [--out FILE] [--folder FOLDER] [--limit SECONDS] [--tiny]

Every contender is a process of its own: 8 sequences of 2,048 tokens in one micro-step, weights drawn at random in bf16,
AdamW, no activation checkpointing. fastft packs whole documents that cannot see each other; Trainer's rows are cut from
one stream, as its users do it, and every token sees all before it. The text is what any Python carries (as in `fastft
quickstart`). Rows go to FILE as they come; a contender that fails is a row with its error. --profile prints where a
step's GPU time goes, by kernel. --tiny: a small model, to show on a CPU that all of it runs.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LENGTH, SEQUENCES = 2048, 8
WARMUP = 48  # an epoch and more: attention builds a graph when a step has more documents than any before
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
}
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
}
TRAINER = {
    "Trainer + Liger, bf16 weights": {"dtype": "bfloat16", "liger": True},
    "Trainer + Liger, autocast": {"dtype": "float32", "liger": True},
    "Trainer, bf16 weights": {"dtype": "bfloat16", "liger": False},
}
USUAL = ["fastft", "Trainer + Liger, bf16 weights"]


def prepare(folder: Path, shape: str) -> Path:
    """Model folder (configuration and tokenizer), documents, and the rows for Trainer; returns a configuration."""
    import transformers

    from fastft import quickstart

    where = folder / shape
    if not (where / "run.yaml").is_file():
        quickstart.write_corpus(where / "corpus")
        quickstart.write_base(where / "model", where / "corpus")
        tokenizer = transformers.AutoTokenizer.from_pretrained(where / "model")
        family, sizes = SHAPES[shape]
        config = getattr(transformers, f"{family}Config")(
            **sizes,
            max_position_embeddings=LENGTH,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            architectures=[f"{family}ForCausalLM"],
        )
        config.save_pretrained(where / "model")
        files = [where / "corpus" / f"{name}.train.jsonl" for name in ("general", "domain")]
        texts = [json.loads(line)["text"] for file in files for line in file.read_text("utf-8").splitlines()]
        flat: list[int] = []
        for ids in tokenizer(texts, verbose=False)["input_ids"]:
            flat += [*ids, tokenizer.eos_token_id]
        length = 128 if shape == "tiny" else LENGTH
        rows = np.array(flat[: len(flat) // length * length], dtype=np.int32).reshape(-1, length)
        np.save(where / "rows.npy", np.random.default_rng(0).permutation(rows))
        run = {
            "task": "causal_lm",
            "model": {"path": str(where / "model"), "init": "random", "dtype": "bf16"},
            "data": {"train": [str(file) for file in files], "max_length": length, "truncation": "split"},
            "batch": {"size": SEQUENCES},
            "optim": {"lr": 1e-4, "schedule": "constant"},
            "train": {"epochs": 100, "log_every": 10},
            "run": {"dir": str(where / "run"), "offline": True},
            "parallel": {"verify_every": None},
        }
        (where / "run.yaml").write_text(json.dumps(run))  # JSON is YAML
    return where / "run.yaml"


def of_fastft(config: Path, overrides: list[str], steps: int, limit: float) -> dict:
    command = [sys.executable, "-m", "fastft", "bench", str(config), *overrides]
    report = json.loads(run([*command, "--warmup", str(WARMUP), "--steps", str(steps), "--json"], limit))
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


def of_trainer(config: Path, settings: dict, steps: int, limit: float) -> dict:
    spec = {
        **settings,
        "model": str(config.parent / "model"),
        "rows": str(config.parent / "rows.npy"),
        "sequences": SEQUENCES,
        "warmup": WARMUP,
        "steps": steps,
        "folder": str(config.parent / "trainer"),
    }
    found = config.parent / "spec.json"
    found.write_text(json.dumps(spec))
    return json.loads(run([sys.executable, str(ROOT / "benchmarks/peers/decoder.py"), str(found)], limit))


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
    parser.add_argument("--contenders", nargs="+", default=USUAL, choices=[*FASTFT, *TRAINER])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu/step.jsonl")
    parser.add_argument("--folder", type=Path, default=ROOT / "build/gpu/step")
    parser.add_argument("--limit", type=float, default=60, help="seconds for one contender")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    missing = 0
    for shape in ["tiny"] if args.tiny else args.shapes:
        config = prepare(args.folder, shape)
        if args.profile:
            for name in args.contenders:
                if name in FASTFT:
                    profile(config, FASTFT[name])
            continue
        for name in args.contenders:
            row = {"shape": shape, "contender": name, "date": time.strftime("%Y-%m-%d")}
            try:
                if name in FASTFT:
                    row |= of_fastft(config, FASTFT[name], args.steps, args.limit)
                else:
                    row |= of_trainer(config, TRAINER[name], args.steps, args.limit)
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
