"""`fastft prepare` beside `datasets.map(batched=True, num_proc=2)` and beside datatrove: the same texts, tokenizer and
filters, in one run.

    python benchmarks/corpus.py --tokenizer FOLDER --texts FILE.txt.gz ... [--peers-python PYTHON] [--machine NAME]

The texts' lines are put together in ``--copies`` random orders to documents of 1 to 12 lines: none comes twice.
``packing``: text to packed tokens. ``rules``: the rules encoding, unicode, whitespace, length, repetition and quality
before that. The map gets every ``--share``-th document, for it would take an hour with all, and in ``rules`` the same
functions on batches of 1,000 documents, with Hugging Face's tokenizer behind them; datatrove gets the same documents
in two files, and its own blocks: FTFYFormatter with NFC, LambdaFilter of the length, GopherRepetitionFilter,
GopherQualityFilter, DocumentTokenizer without shuffling, two tasks of its local executor: as it comes, with spaCy's
words, and with words by white space. ``rules`` is run by fastft on every 8th document. All begin when their tokenizer
is loaded (datatrove's tasks load it themselves) and start two processes then; ours hashes the files and compares the
sample, too.

The second table has the time of each rule and block in one process, in ms a MB of what comes to it.
"""

import argparse
import gzip
import json
import math
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from itertools import islice
from pathlib import Path

from common import RESULTS, default_machine

RULES = ("encoding", "unicode", "whitespace", "length", "repetition", "quality")
LENGTH = 1024
TROVE = "datatrove"


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


def ours(folder: Path, name: str, tokenizer: str, rules: tuple[str, ...]) -> dict:
    """Prepare, then plan packs as a training does."""
    import numpy as np

    from fastft.config.corpus import corpus_config
    from fastft.corpus import build
    from fastft.corpus.tokens import facts_of
    from fastft.data.pack import best_fit
    from fastft.tasks._documents import pieces

    raw = {"sources": {"path": str(folder / name), "name": "texts"}, "output": str(folder / "out"), "workers": 2}
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
    from fastft.corpus.rules.base import Document

    chosen = [kind(kind.Settings()) for _, kind in _rules(rules)]
    left = list(map(Document, texts))
    for rule in chosen:
        rule.look(left)
        left = [document for document in left if rule.apply(document) is None]
    return [document.text for document in left]


def by_rule(folder: Path, tokenizer: str, rules: tuple[str, ...]) -> dict[str, float]:
    """Seconds a MB of what comes to it, of reading, each rule and the encoder, in this process."""
    from fastft.corpus.lines import Lines, cut
    from fastft.corpus.rules.base import Document
    from fastft.corpus.tokens import Encoder, facts_of

    chosen = [(name, kind(kind.Settings())) for name, kind in _rules(rules)]
    encoder = Encoder(facts_of(tokenizer, None), True)
    seconds, size = dict.fromkeys(("reading", *rules, "tokens"), 0.0), dict.fromkeys(("reading", *rules, "tokens"), 0)

    def timed(name, characters, do, *of):
        start = time.perf_counter()
        found = do(*of)
        seconds[name] += time.perf_counter() - start
        size[name] += characters
        return found

    def apply(rule, left):
        rule.look(left)
        return [document for document in left if rule.apply(document) is None]

    with open(folder / "part.jsonl", "rb") as f:
        for at, content in enumerate(cut(f.read1)):
            part = Lines(content, 1, "", 0, "text", 1 << 30)
            left = list(map(Document, timed("reading", len(content), part.rows)[0].texts))
            for name, rule in chosen:
                left = timed(name, _size(left), apply, rule, left)
            timed("tokens", _size(left), encoder.encode, [document.text for document in left])
            if not at:  # what is made at the first use is no part of it
                seconds, size = dict.fromkeys(seconds, 0.0), dict.fromkeys(size, 0)
    return {name: seconds[name] / size[name] * 1e6 for name in seconds}


def _size(documents: list) -> int:
    return sum(len(document.text.encode()) for document in documents)


def _rules(names: tuple[str, ...]) -> list:
    from fastft import rooms

    return sorted(((name, rooms.RULES.get(name)) for name in names), key=lambda rule: rule[1].order)


def trove(folder: Path, python: str, tokenizer: str, split: bool) -> dict:
    """``split``: words by white space, as ours."""
    from transformers import AutoTokenizer

    lines = (folder / "part.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "halves").mkdir(exist_ok=True)
    for half in (0, 1):
        (folder / "halves" / f"{half}.jsonl").write_bytes(b"".join(lines[half::2]))
    for name in ("trove", "logs"):
        shutil.rmtree(folder / name, ignore_errors=True)
    spec = {
        "split": split,
        "texts": str(folder / "halves"),
        "output": str(folder / "trove"),
        "logs": str(folder / "logs"),
        "tokenizer": str(Path(tokenizer) / "tokenizer.json"),
        "end": AutoTokenizer.from_pretrained(tokenizer).eos_token,
        "least": 20,
    }
    path = folder / "spec.json"
    path.write_text(json.dumps(spec))
    script = Path(__file__).parent / "peers/corpus.py"
    environ = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([python, str(script), str(path)], stdout=subprocess.PIPE, text=True, check=True, env=environ)
    return json.loads(done.stdout.splitlines()[-1])


def shared(path: Path, out: Path, share: int) -> int:
    """Every ``share``-th line in a file of its own; its bytes."""
    with open(path, "rb") as lines, open(out, "wb") as f:
        f.writelines(islice(lines, 0, None, share))
    return out.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--copies", type=int, default=128)
    parser.add_argument("--share", type=int, default=128)
    parser.add_argument("--peers-python", help="of make peers; without it there is no row of datatrove")
    parser.add_argument("--machine", default=default_machine())
    parser.add_argument("--quick", action="store_true", help="one copy, nothing recorded: does it run?")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # two processes, as ours
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder / "all.jsonl", args.texts, 1 if args.quick else args.copies)
        size = {"all": (folder / "all.jsonl").stat().st_size}
        for part, share in (("part", args.share), ("some", 8)):
            size[part] = shared(folder / "all.jsonl", folder / f"{part}.jsonl", share)
        for case, rules, whole in (("packing", (), "all"), ("rules", RULES, "some")):
            peer, mine = mapped(folder, args.tokenizer, rules), ours(folder, f"{whole}.jsonl", args.tokenizer, rules)
            rows += [(case, "map", "part", peer), (case, "fastft", whole, mine)]
        if args.peers_python:
            for who, split in ((TROVE, False), (f"{TROVE}, words by white space", True)):
                rows.insert(-1, ("rules", who, "part", trove(folder, args.peers_python, args.tokenizer, split)))
        each = by_rule(folder, args.tokenizer, RULES)
    blocks = {who: row["blocks"] for _, who, _, row in rows if "blocks" in row}
    table = [
        "| case | by | MB | seconds | MB/s | tokens/s | fastft against it |",
        "|---|---|---|---|---|---|---|",
    ]
    rates = {(case, who): size[part] / row["seconds"] / 1e6 for case, who, part, row in rows}
    for case, who, part, row in rows:
        times = f"{rates[case, 'fastft'] / rates[case, who]:.1f} x" if who != "fastft" else ""
        per = f"{row['tokens'] / row['seconds']:,.0f}"
        cells = [case, who, f"{size[part] / 1e6:,.0f}", f"{row['seconds']:.1f}", f"{rates[case, who]:.2f}", per, times]
        table.append("| " + " | ".join(cells) + " |")
    table += ["", f"Tokens by {rows[-1][-1]['by']}.", "", "| in fastft | ms a MB |", "|---|---|"]
    table += [f"| {name} | {found * 1e3:.1f} |" for name, found in each.items()]
    if blocks:
        table += ["", "| ms a MB of the input | " + " | ".join(blocks) + " |", "|---|" + "---|" * len(blocks)]
        for name in blocks[TROVE]:
            cells = [name, *(f"{found[name] / size['part'] * 1e9:.1f}" for found in blocks.values())]
            table.append("| " + " | ".join(cells) + " |")
    print("\n".join(table))
    if args.quick:
        return
    names = ("datasets", "tokenizers", "transformers", "gigatoken", "numpy", "ftfy")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    for _, who, _, row in rows:
        if who == TROVE:
            versions += ", " + ", ".join(f"{n} {v}" for n, v in row["versions"].items() if n in ("datatrove", "spacy"))
    head = __doc__.partition("\n\n    python")[0] + "\n" + __doc__.partition("NAME]\n")[2].rstrip()
    facts = f"{args.machine}; {time.strftime('%Y-%m-%d')}; python {platform.python_version()}, {versions}"
    RESULTS.joinpath("corpus.md").write_text(f"# corpus\n\n{head}\n\n{facts}\n\n" + "\n".join(table) + "\n")


if __name__ == "__main__":
    sys.exit(main())
