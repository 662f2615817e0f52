"""Planted near-duplicates and `fastft prepare`: how many are found, at which similarity, at what cost.

    python benchmarks/duplicates.py --tokenizer FOLDER --texts FILE.txt.gz ... [--copies 16] [--machine NAME]

The texts' lines are put together in a random order to documents of 1 to 12 lines, and every one of at least 40 words is
planted once more, behind all of them, changed in one of five ways and to a random degree: words replaced, deleted,
inserted; sentences swapped; case, punctuation and white space changed. The similarity of a pair is the Jaccard index of
its word 5-grams (lower case, without punctuation), counted here by Python's sets. Recall: of the planted ones those
that were left out. Precision: of all that were left out those that are that similar to a document before them.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path

from common import RESULTS, default_machine
from corpus import RULES, write_documents

WORD = re.compile(r"[^\W_]+")
BANDS = [0.5 + 0.05 * i for i in range(11)]


def grams(text: str, n: int = 5) -> frozenset[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return frozenset(tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1)))


def jaccard(one: frozenset, other: frozenset) -> float:
    return len(one & other) / len(one | other)


def replaced(text: str, rate: float, rng: random.Random) -> str:
    return " ".join(f"w{rng.randrange(10**6)}" if rng.random() < rate else word for word in text.split())


def deleted(text: str, rate: float, rng: random.Random) -> str:
    return " ".join(word for word in text.split() if rng.random() >= rate)


def inserted(text: str, rate: float, rng: random.Random) -> str:
    return " ".join(f"{word} w{rng.randrange(10**6)}" if rng.random() < rate else word for word in text.split())


def swapped(text: str, rate: float, rng: random.Random) -> str:
    """Neighbouring sentences (or runs of 12 words, where there are no sentences)."""
    parts = re.split(r"(?<=[.!?])\s+", text)
    if len(parts) < 3:
        words = text.split()
        parts = [" ".join(words[i : i + 12]) for i in range(0, len(words), 12)]
    for _ in range(max(1, round(rate * len(text.split()) / 3))):
        at = rng.randrange(max(1, len(parts) - 1))
        parts[at : at + 2] = reversed(parts[at : at + 2])
    return " ".join(parts)


def restyled(text: str, rate: float, rng: random.Random) -> str:
    """Case, punctuation and white space, 10 times as often: no word is changed."""

    def other(word: str) -> str:
        if rng.random() >= 10 * rate:
            return word
        return rng.choice([word.upper(), word.title(), f"{word},", f'"{word}"', f"{word}\n\n", f"  {word}"])

    return " ".join(map(other, text.split()))


KINDS = {
    "words replaced": replaced,
    "words deleted": deleted,
    "words inserted": inserted,
    "sentences swapped": swapped,
    "case, punctuation, spaces": restyled,
}


def planted(texts: list[str], rng: random.Random, shortest: int = 40) -> list[tuple[int, str, str]]:
    """(document, kind, changed text) of all that have ``shortest`` words, in a random order."""
    found = []
    for number, text in enumerate(texts):
        if len(text.split()) >= shortest:
            kind = list(KINDS)[number % len(KINDS)]
            found.append((number, kind, KINDS[kind](text, 10 ** rng.uniform(-3, -1.1), rng)))
    rng.shuffle(found)
    return found


def prepared(folder: Path, tokenizer: str, files: list[Path], workers: int = 2, **settings):
    from fastft.config.corpus import corpus_config
    from fastft.corpus.build import prepare

    sources = [{"path": str(file), "name": file.stem} for file in files]
    raw = {"sources": sources, "output": str(folder), "tokenizer": str(tokenizer), "workers": workers, **settings}
    return prepare(corpus_config(raw, "benchmark"), overwrite=True)


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    return path


def stayed(corpus, source: int) -> set[int]:
    """Rows of a file of lines that stay, from 0."""
    import numpy as np

    shards = [i for i, shard in enumerate(corpus.shards) if shard.source == source]
    return {int(row) - 1 for i in shards for row in np.load(corpus.path(i) / "places.npy")[:, 1]}


def found(
    folder: Path, tokenizer: str, texts: list[str], copies: list[tuple[int, str, str]], near: dict, **more
) -> dict:
    """What became of the planted ones: ``pairs`` (kind, similarity, left out?), ``precision``, ``compared``."""
    files = [write(folder / "whole.jsonl", texts), write(folder / "planted.jsonl", [text for *_, text in copies])]
    corpus = prepared(folder / "out", tokenizer, files, duplicates={"near": near}, **more)
    kept = [stayed(corpus, source) for source in (0, 1)]
    sets = [grams(text, near.get("ngram", 5)) for text in texts]
    pairs, wrong, left_out = [], 0, 0
    known: dict[tuple[str, ...], list[int]] = {}
    for number, own in enumerate(sets):
        for gram in own:
            known.setdefault(gram, []).append(number)
    threshold = near.get("threshold", 0.8)

    def alike(own: frozenset, before: int) -> bool:
        counts = Counter(other for gram in own for other in known.get(gram, ()) if other < before)
        return any(jaccard(own, sets[other]) >= threshold - 0.04 * (len(own) > 1024) for other in counts)

    for row, (number, kind, text) in enumerate(copies):
        own = grams(text, near.get("ngram", 5))
        out = row not in kept[1]
        pairs.append((kind, jaccard(own, sets[number]), out))
        if out:
            left_out += 1
            wrong += not alike(own, len(sets))
    for number in set(range(len(texts))) - kept[0]:
        left_out += 1
        wrong += not alike(sets[number], number)
    rule = corpus.manifest["rules"]["duplicates"]
    return {"pairs": pairs, "precision": 1 - wrong / max(1, left_out), "left_out": left_out, "rule": rule}


def recall(pairs: list, least: float, most: float = 1.01, kind: str = "") -> str:
    chosen = [out for of, alike, out in pairs if least <= alike < most and kind in ("", of)]
    return f"{sum(chosen) / len(chosen):.4f} ({len(chosen)})" if chosen else "-"


def cost(folder: Path, tokenizer: str, file: Path, settings: dict) -> dict:
    """Seconds by the clock and of all processes' CPU, and peak memory of the first process above what it has before."""
    code = (
        "import json, os, re, sys, time; sys.path[:0] = ['benchmarks']; import duplicates; from pathlib import Path\n"
        "folder, tokenizer, file, settings = sys.argv[1:]\n"
        "from fastft.corpus import build; from fastft.corpus.tokens import facts_of\n"
        "facts = facts_of(tokenizer, None); build.tokens.facts_of = lambda path, revision: facts\n"
        "memory = lambda of: int(re.search(of + r':\\s+(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "Path('/proc/self/clear_refs').write_text('5')\n"
        "before, start, begun = memory('VmRSS'), time.perf_counter(), sum(os.times()[:4])\n"
        "corpus = duplicates.prepared(Path(folder), tokenizer, [Path(file)], **json.loads(settings))\n"
        "seconds, peak = time.perf_counter() - start, memory('VmHWM')\n"
        "documents, used = corpus.manifest['totals']['documents'], sum(os.times()[:4]) - begun\n"
        "print(json.dumps([seconds, used, before, peak, documents]))\n"
    )
    command = [sys.executable, "-c", code, str(folder), tokenizer, str(file), json.dumps(settings)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=RESULTS.parent.parent).stdout
    seconds, used, before, after, documents = json.loads(output.splitlines()[-1])
    return {"seconds": seconds, "used": used, "memory": (after - before) * 1024, "documents": documents}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--copies", type=int, default=16, help="random orders of the lines, for the rates")
    parser.add_argument("--machine", default=default_machine())
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder / "texts.jsonl", args.texts, 1)
        lines = (folder / "texts.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        texts = [text for text in texts if WORD.search(text)]
        copies = planted(texts, random.Random(0))
        variants = [{"threshold": t} for t in (0.8, 0.7, 0.6)]
        variants += [{"bands": 20, "rows": 5}, {"bands": 8, "rows": 8}, {"ngram": 3}]
        results = []
        for near in variants:
            results.append(found(folder, args.tokenizer, texts, copies, near))
            said = ", ".join(f"{key} {value}" for key, value in near.items())
            print(f"{said}: recall from 0.85 on {recall(results[-1]['pairs'], 0.85)}", flush=True)
        first = results[0]
        kinds = [
            [kind, recall(first["pairs"], 0.85, kind=kind), recall(first["pairs"], 0.8, kind=kind)] for kind in KINDS
        ]
        kinds.append(["all", recall(first["pairs"], 0.85), recall(first["pairs"], 0.8)])
        heads, columns = [], []
        for near, result in zip(variants, results, strict=True):
            rule = result["rule"]
            own = ", ".join(f"{key} {value}" for key, value in near.items() if key not in ("bands", "rows"))
            heads.append(f"{own or 'threshold 0.8'}, {rule['bands']} x {rule['rows']}")
            columns.append([recall(result["pairs"], low, low + 0.05 if low < 1 else 1.01) for low in BANDS])
        by_band = [
            [f"{low:.2f} to {low + 0.05:.2f}" if low < 1 else "1", *(column[i] for column in columns)]
            for i, low in enumerate(BANDS)
        ]
        by_band.append(["precision", *(f"{r['precision']:.4f} ({r['left_out']})" for r in results)])
        by_band.append(["pairs compared", *(f"{r['rule']['compared']:,}" for r in results)])
        write_documents(folder / "all.jsonl", args.texts, args.copies)
        size = (folder / "all.jsonl").stat().st_size
        rates, load = [], os.getloadavg()[0]
        for rules in ((), RULES):
            for duplicates in ("keep", "exact", "near"):
                settings = {"duplicates": duplicates, "rules": list(rules)}
                taken = cost(folder / "out", args.tokenizer, folder / "all.jsonl", settings)
                memory = f"{taken['memory'] / 1e6:,.0f}"
                rate, own = (f"{size / taken[name] / 1e6:.1f}" for name in ("seconds", "used"))
                rates.append(["six" if rules else "none", duplicates, rate, own, memory, f"{taken['documents']:,}"])
                print(*rates[-1], flush=True)
    head, about = __doc__.partition("\n\n    python")[0], __doc__.partition("NAME]\n")[2]
    pieces = [
        f"# duplicates\n\n{head}\n{about}",
        f"{args.machine}; {time.strftime('%Y-%m-%d')}; numpy {metadata.version('numpy')}; {len(texts):,} documents, "
        f"{len(copies):,} planted.\n\nRecall by kind of change, defaults (pairs in brackets):\n",
        table(["change", "similarity from 0.85 on", "from 0.8 on"], kinds),
        "\nRecall by similarity; parameters, bands x rows:\n",
        table(["similarity", *heads], by_band),
        f"\nWhat it costs: {size / 1e6:.0f} MB, two workers, a load of {load:.0f} before; "
        "CPU seconds of all processes; memory of the first one above what it imports:\n",
        table(["rules", "duplicates", "MB/s", "MB per CPU second", "MB of memory", "documents that stay"], rates),
    ]
    RESULTS.joinpath("duplicates.md").write_text("\n".join(pieces) + "\n")
    print("\n".join(pieces))


if __name__ == "__main__":
    sys.exit(main())
