"""Whole runs of this version beside those of another checkout, in turns: is what was fast as fast as before?

python benchmarks/versions.py OTHER --bert FOLDER [--rounds 5]

OTHER is a checkout of another commit with its native module in place; FOLDER a BERT. Each case is the same
configuration, in keys that both know; the rate is taken between the first and the last logged step, and a ratio is the
median over the rounds of (this version's rate / the other's).

banking77    classification of short questions, BERT, batch 32, fp32, ZeRO 0
train_step   a small decoder with a vocabulary of 50k, bf16, ZeRO 0: the loss at the head and AdamW
zero_step    the same at ZeRO 2 on two ranks with little to compute: the optimizer's step
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from common import RESULTS

ROOT = Path(__file__).resolve().parent.parent


def cases(folder: Path, bert: str) -> dict[str, tuple[int, dict]]:
    """Ranks and configuration."""
    data = ROOT / "configs" / "data"
    run = {"offline": True, "device": "cpu"}
    lm = {
        "task": "causal_lm",
        "model": {"path": str(decoder(folder)), "init": "random", "dtype": "bf16"},
        "data": {"train": str(data / "medical" / "train.txt.gz"), "max_length": 128, "overlength": "split"},
        "optim": {"lr": 1e-4},
        "run": run,
    }
    banking = {
        "task": "classification",
        "model": {"path": bert},
        "data": {
            "train": str(data / "banking77" / "train.csv.gz"),
            "label": "category",
            "max_length": 128,
            "overlength": "truncate",
        },
        "batch": {"size": 32},
        "optim": {"lr": 1e-4},
        "train": {"steps": 41, "log_every": 40},
        "run": run,
    }
    return {
        "banking77": (1, banking),
        "train_step": (1, {**lm, "batch": {"size": 8}, "train": {"steps": 21, "log_every": 20}}),
        "zero_step": (
            2,
            {**lm, "batch": {"size": 2}, "train": {"steps": 31, "log_every": 30}, "parallel": {"zero": 2}},
        ),
    }


def decoder(folder: Path) -> Path:
    """The configuration of a small Llama with 50k words, of which the tokenizer knows its bytes."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    path = folder / "decoder"
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["a"], vocab_size=300, special_tokens=["<eos>", "<pad>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>")
    tokenizer.save_pretrained(path)
    shape = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    LlamaConfig(vocab_size=50_257, max_position_embeddings=128, **shape, **tokens).save_pretrained(path)
    return path


def rate(checkout: Path, folder: Path, ranks: int, config: dict) -> float:
    """Steps per second of a run."""
    config = json.loads(json.dumps(config))
    config["run"]["dir"] = str(folder / "run")
    config["data"]["cache"] = str(folder / f"prepared-{checkout.name}")
    (folder / "c.yaml").write_text(yaml.safe_dump(config))
    arguments = ["launch", "--nproc", str(ranks), "train", "--overwrite", str(folder / "c.yaml")]
    arguments = arguments if ranks > 1 else arguments[3:]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run(
        [sys.executable, "-m", "fastft", *arguments], check=True, capture_output=True, env=environment, cwd=checkout
    )
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    first, *_, last = [record for record in lines if record["kind"] == "train"]
    return (last["step"] - first["step"]) / (last["time"] - first["time"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path)
    parser.add_argument("--bert", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", default="banking77,train_step,zero_step")
    parser.add_argument("--machine", default="")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=args.other, capture_output=True, text=True, check=True
    ).stdout.strip()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, (ranks, config) in cases(folder, args.bert).items():
            if case not in args.cases.split(","):
                continue
            ratios, ours = [], []
            for i in range(args.rounds):
                order = (ROOT, args.other.resolve()) if i % 2 else (args.other.resolve(), ROOT)
                rates = {checkout: rate(checkout, folder, ranks, config) for checkout in order}
                ratios.append(rates[ROOT] / rates[args.other.resolve()])
                ours.append(rates[ROOT])
            spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
            rows.append(f"| {case} | {statistics.median(ours):.2f} | {statistics.median(ratios):.2f} | {spread} |")
            print(rows[-1], flush=True)
    text = [
        "# versions",
        "",
        f"Written by `python benchmarks/versions.py`: this version beside {commit}, {args.rounds} rounds in turns. "
        f"{args.machine}",
        "",
        "| case | steps/s | ratio (median of rounds) | min-max |",
        "|---|---|---|---|",
        *rows,
    ]
    (RESULTS / "versions.md").write_text("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
