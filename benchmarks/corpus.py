"""`fastft prepare` beside `datasets.map(batched=True, num_proc=2)`: the same texts, tokenizer and filters, in one run.

    python benchmarks/corpus.py --tokenizer FOLDER --texts FILE.txt.gz ... [--copies 128] [--share 128] [--machine NAME]

The texts' lines are put together in ``--copies`` random orders to documents of 1 to 12 lines: none comes twice. The
map gets every ``--share``-th document, for it would take an hour with all. ``packing``: text to packed tokens.
``rules``: the rules encoding, unicode, whitespace, length, repetition and quality before that, in the map as the same
functions on batches of 1,000 documents, with Hugging Face's tokenizer behind them. Both begin when their tokenizer
is loaded, and start two processes then; ours hashes the files and compares the sample before.
"""

import argparse
import gzip
import json
import math
import os
import platform
import random
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

from common import RESULTS, default_machine

RULES = ("encoding", "unicode", "whitespace", "length", "repetition", "quality")
LENGTH = 1024


def write_documents(path: Path, texts: list[str], copies: int, most: float = math.inf) -> int:
    """JSON lines, of so many copies or until there are ``most`` bytes; returns how many lines."""
    rng, count = random.Random(0), 0
    lines = [line for name in texts for line in gzip.decompress(Path(name).read_bytes()).decode().split("\n") if line]
    with open(path, "wb") as f:
        for _ in range(copies):
            rng.shuffle(lines)
            at = 0
            while at < len(lines) and f.tell() < most:
                size = rng.randint(1, 12)
                f.write(json.dumps({"text": "\n".join(lines[at : at + size])}, ensure_ascii=False).encode() + b"\n")
                at, count = at + size, count + 1
            if f.tell() >= most:
                break
    return count


def ours(folder: Path, tokenizer: str, rules: tuple[str, ...]) -> dict:
    """Prepare, then plan packs as a training does."""
    import numpy as np

    from fastft.config.corpus import corpus_config
    from fastft.corpus import build
    from fastft.corpus.tokens import facts_of
    from fastft.data.pack import best_fit
    from fastft.tasks._documents import pieces

    raw = {"sources": {"path": str(folder / "all.jsonl"), "name": "texts"}, "output": str(folder / "out"), "workers": 2}
    config = corpus_config({**raw, "tokenizer": tokenizer, "rules": list(rules), "duplicates": "keep"}, "benchmark")
    facts = facts_of(tokenizer, None)
    build.tokens.facts_of = lambda path, revision: facts  # loaded before the clock runs
    start = time.perf_counter()
    corpus = build.prepare(config, overwrite=True)
    for shard in range(len(corpus.shards)):
        lengths = np.asarray(corpus.tokens(shard).lengths())
        best_fit(pieces(lengths, LENGTH, "split", 1)[2], LENGTH)
    seconds = time.perf_counter() - start
    totals = corpus.manifest["totals"]
    return {"seconds": seconds, "documents": totals["documents"], "tokens": totals["tokens"], "by": _by(corpus)}


def _by(corpus) -> str:
    said = corpus.manifest["tokens"]
    return f"{said['encoder']}: {said['because']}"


def mapped(folder: Path, tokenizer: str, rules: tuple[str, ...]) -> dict:
    """The usual way: filters and tokenizer in a map, then the ids of a batch put together and cut."""
    import datasets
    import transformers

    datasets.disable_caching()
    datasets.disable_progress_bars()
    loaded = transformers.AutoTokenizer.from_pretrained(tokenizer)
    data = datasets.load_dataset("json", data_files=str(folder / "part.jsonl"), cache_dir=str(folder / "cache"))[
        "train"
    ]
    end = loaded.eos_token_id

    def work(batch: dict) -> dict:
        texts = cleaned(batch["text"], rules) if rules else batch["text"]
        ids = [token for row in loaded(texts)["input_ids"] for token in (*row, end)] if texts else []
        return {"input_ids": [ids[at : at + LENGTH] for at in range(0, len(ids), LENGTH)]}

    start = time.perf_counter()
    found = data.map(work, batched=True, num_proc=2, remove_columns=data.column_names)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "documents": len(data), "tokens": sum(map(len, found["input_ids"]))}


def cleaned(texts: list[str], rules: tuple[str, ...]) -> list[str]:
    from fastft import rooms
    from fastft.corpus.rules.base import Document

    chosen = [kind(kind.Settings()) for kind in map(rooms.RULES.get, rules)]
    left = list(map(Document, texts))
    for rule in chosen:
        rule.look(left)
        left = [document for document in left if rule.apply(document) is None]
    return [document.text for document in left]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--copies", type=int, default=128)
    parser.add_argument("--share", type=int, default=128)
    parser.add_argument("--machine", default=default_machine())
    parser.add_argument("--quick", action="store_true", help="one copy, nothing recorded: does it run?")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # two processes, as ours
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder / "all.jsonl", args.texts, 1 if args.quick else args.copies)
        lines = (folder / "all.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / "part.jsonl").write_text("".join(lines[:: args.share]), encoding="utf-8")
        size = {part: (folder / f"{part}.jsonl").stat().st_size for part in ("all", "part")}
        for case, rules in (("packing", ()), ("rules", RULES)):
            peer, mine = mapped(folder, args.tokenizer, rules), ours(folder, args.tokenizer, rules)
            rates = size["part"] / peer["seconds"] / 1e6, size["all"] / mine["seconds"] / 1e6
            rows.append((case, peer, mine, rates))
            print(
                f"{case}: map {rates[0]:.2f} MB/s, fastft {rates[1]:.2f} MB/s, {rates[1] / rates[0]:.1f} x", flush=True
            )
    table = [
        "| case | map MB/s | fastft MB/s | ratio | map tokens/s | fastft tokens/s | tokens by |",
        "|---|---|---|---|---|---|---|",
    ]
    for case, peer, mine, rates in rows:
        per = [f"{one['tokens'] / one['seconds']:,.0f}" for one in (peer, mine)]
        cells = [case, f"{rates[0]:.2f}", f"{rates[1]:.2f}", f"{rates[1] / rates[0]:.1f}", *per, mine["by"]]
        table.append("| " + " | ".join(cells) + " |")
    print("\n".join(table))
    if args.quick:
        return
    names = ("datasets", "tokenizers", "transformers", "gigatoken", "numpy", "ftfy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    head = __doc__.partition("\n\n    python")[0] + "\n" + __doc__.partition("NAME]\n")[2].rstrip()
    facts = f"{args.machine}; {time.strftime('%Y-%m-%d')}; python {platform.python_version()}, {versions}; "
    facts += f"{size['all'] / 1e6:.0f} MB for fastft, {size['part'] / 1e6:.0f} MB for the map"
    RESULTS.joinpath("corpus.md").write_text(f"# corpus\n\n{head}\n\n{facts}\n\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    sys.exit(main())
