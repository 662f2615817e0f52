"""What new tokens for a domain are worth: tokens and loss per character, before and after a small training.

    python benchmarks/vocabulary.py --model FOLDER --corpus FILE.txt.gz --variant plain|extended [--count 1000]

Both variants learn the same documents, in full, with as many sequences in a step, and are measured on the same held-out
ones: the last tenth of the corpus, cut to ``--held-out`` characters. The vocabulary is chosen from the rest. A loss per
token says nothing of two tokenizers, so it is told per character (nats): the sum over the tokens by the characters. A
row for each variant is added to benchmarks/results/vocabulary.jsonl; vocabulary.md is written from all rows.
"""

import argparse
import gzip
import json
import tempfile
import time
from pathlib import Path

import common
from common import RESULTS, default_machine

from fastft import config as configuration
from fastft import track
from fastft.config import Model
from fastft.models import load, vocabulary
from fastft.train import loop

COLUMNS = {
    "model": "s",
    "corpus": "s",
    "variant": "s",
    "new_tokens": ",",
    "tokens_per_document": ",.0f",
    "tokens_per_character": ".4f",
    "before": ".4f",
    "after": ".4f",
    "train_characters": ",",
    "lr": "g",
    "seconds": ".0f",
    "machine": "s",
}


def split(path: Path, train: int, held_out: int) -> tuple[list[str], list[str], list[str], list[str]]:
    """Documents to choose tokens from, to learn (about ``train`` characters of them), to measure on (about
    ``held_out``), and those that are held out, whole.
    """
    documents = [d for d in gzip.decompress(path.read_bytes()).decode().split("\n\n") if d.strip()]
    cut = len(documents) * 9 // 10
    return documents[:cut], _about(documents[:cut], train), _about(documents[cut:], held_out), documents[cut:]


def _about(documents: list[str], characters: int) -> list[str]:
    found: list[str] = []
    for document in documents:
        found.append(document[: characters - sum(map(len, found))])
        if sum(map(len, found)) >= characters:
            break
    return found


def measure(args: argparse.Namespace, folder: Path) -> dict:
    rest, learned, held_out, whole = split(args.corpus, args.train, args.held_out)
    model, new = args.model, 0
    if args.variant == "extended":
        tokenizer = load.tokenizer(Model(path=model))
        found = vocabulary.chosen(tokenizer, rest, args.count, 10)
        vocabulary.save(model, folder / "model", tokenizer, found, held_out)
        model, new = str(folder / "model"), len(found.tokens)
    for name, documents in (("train", learned), ("eval", held_out)):
        rows = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        (folder / f"{name}.jsonl").write_text(rows)
    config = {
        "task": "causal_lm",
        "model": {"path": model, "dtype": "fp32"},
        "data": {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")},
        "batch": {"size": args.batch},
        "optim": {"lr": args.lr, "warmup": 0.1, "schedule": "cosine"},
        "train": {"epochs": 1, "eval_at_start": True, "log_every": 1},
        "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu"},
    }
    config["data"] |= {"max_length": 256, "truncation": "split"}
    lengths = [len(ids) for ids in load.tokenizer(Model(path=model))(whole)["input_ids"]]
    start = time.perf_counter()
    loop.train(configuration.validate(config))
    records = [r for r in track.read(folder / "run") if r["kind"] == "eval"]
    characters = sum(map(len, held_out))
    per_character = [record["loss"] * record["tokens"] / characters for record in (records[0], records[-1])]
    return {
        "model": args.name or Path(args.model).name,
        "corpus": args.corpus.parent.name,
        "variant": args.variant,
        "new_tokens": new,
        "tokens_per_document": sum(lengths) / len(lengths),
        "tokens_per_character": records[0]["tokens"] / characters,
        "before": per_character[0],
        "after": per_character[1],
        "seconds": time.perf_counter() - start,
        "train_characters": sum(map(len, learned)),
        "held_out_characters": characters,
        "lr": args.lr,
        "machine": args.machine,
    }


def page(rows: list[dict]) -> str:
    title, _, about = str(__doc__).split("\n\n")
    lines = ["# vocabulary", "", title, "", about.strip(), ""]
    lines += common.markdown(rows, COLUMNS).splitlines()
    lines += [
        "",
        "before, after: nats a character of the held-out text. tokens_per_document: of the held-out documents, whole. "
        "seconds: training and both evaluations.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--name", help="how the record names the model; default: its folder's name")
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--variant", required=True, choices=["plain", "extended"])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--train", type=int, default=20_000, help="characters to learn")
    parser.add_argument("--held-out", type=int, default=8_000)
    parser.add_argument("--batch", type=int, default=2, help="sequences of 256 tokens in a step")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--machine", default=default_machine())
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    path = args.results / "vocabulary.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    asked = {
        "model": args.name or Path(args.model).name,
        "corpus": args.corpus.parent.name,
        "variant": args.variant,
        "train_characters": args.train,
        "held_out_characters": args.held_out,
        "lr": args.lr,
    }
    if any(asked.items() <= row.items() for row in rows):
        print(f"{' '.join(map(str, asked.values()))}: there already")
        return
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, Path(folder))
    with open(path, "a") as f:
        f.write(json.dumps(row) + "\n")
    (args.results / "vocabulary.md").write_text(page([*rows, row]))
    print(json.dumps(row))


if __name__ == "__main__":
    main()
