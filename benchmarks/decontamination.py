"""Planted texts of evaluation sets and the rule `decontaminate` of `fastft prepare`: how many are found, at what cost.

    python benchmarks/decontamination.py --tokenizer FOLDER --texts FILE.txt.gz ... --sets FILE ... [--machine NAME]

Documents are the texts' lines in a random order, 1 to 12 together; into every fifth a text of the sets with at least 8
words is put, at a random place: whole; a half of it (of at least 26 words); whole in another case, with other
punctuation and white space; whole with every twentieth word replaced (of at least 40 words). Recall: of the documents
with such a text those that were left out. Precision: of all that were left out those that have 13 words in a row, or
a whole text of 8 to 12 words, in common with the sets, counted here by Python's sets.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from common import RESULTS, default_machine
from corpus import write_documents
from duplicates import WORD, prepared, replaced, restyled, stayed, table, write


def half(text: str, rng: random.Random) -> str:
    words = text.split()
    at = rng.randrange(len(words) // 2)
    return " ".join(words[at : at + (len(words) + 1) // 2])


Change = Callable[[str, random.Random], str]
KINDS: dict[str, tuple[int, Change]] = {  # fewest words, and what becomes of the text
    "whole": (8, lambda text, rng: text),
    "a half": (26, half),
    "case, punctuation, spaces": (8, lambda text, rng: restyled(text, 0.05, rng)),
    "every twentieth word replaced": (40, lambda text, rng: replaced(text, 0.05, rng)),
}


def runs(text: str, n: int = 13, shortest: int = 8) -> set[tuple[str, ...]]:
    """Of an evaluation text: runs of n words, or all its words."""
    words = WORD.findall(text.lower())
    if len(words) < n:
        return {tuple(words)} if len(words) >= shortest else set()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def holds(text: str, known: set[tuple[str, ...]], sizes: range = range(8, 14)) -> bool:
    words = WORD.findall(text.lower())
    return any(tuple(words[i : i + n]) in known for n in sizes for i in range(len(words) - n + 1))


def planted(documents: list[str], texts: list[str], rng: random.Random) -> tuple[list[str], dict[int, str]]:
    """The documents with texts in every fifth; and of which number which kind."""
    found, kinds = list(documents), dict[int, str]()
    words_of = [len(WORD.findall(text)) for text in texts]
    long = {n: [text for text, words in zip(texts, words_of, strict=True) if words >= n] for n, _ in KINDS.values()}
    for count, number in enumerate(range(0, len(documents), 5)):
        kind = list(KINDS)[count % len(KINDS)]
        least, change = KINDS[kind]
        text = rng.choice(long[least])
        words = documents[number].split(" ")
        at = rng.randrange(len(words) + 1)
        found[number] = " ".join([*words[:at], change(text, rng), *words[at:]])
        kinds[number] = kind
    return found, kinds


def found(folder: Path, tokenizer: str, documents: list[str], sets: dict, texts: list[str], **more) -> dict:
    """Numbers of the documents left out, and of those the ones that hold nothing of the texts."""
    rules = {"decontaminate": sets}
    corpus = prepared(
        folder / "out", tokenizer, [write(folder / "all.jsonl", documents)], rules=rules, duplicates="keep", **more
    )
    left_out = set(range(len(documents))) - stayed(corpus, 0)
    known = set().union(*map(runs, texts))
    wrong = [number for number in left_out if not holds(documents[number], known)]
    return {"left_out": left_out, "wrong": wrong, "rule": corpus.manifest["rules"]["decontaminate"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--sets", nargs="+", required=True, help="evaluation sets; a txt file is read by lines")
    parser.add_argument("--machine", default=default_machine())
    args = parser.parse_args()

    from fastft import rooms
    from fastft.corpus.rules.base import Document
    from fastft.corpus.rules.decontaminate import _texts
    from fastft.data import formats

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_documents(folder / "texts.jsonl", args.texts, 1)
        documents = [json.loads(line)["text"] for line in (folder / "texts.jsonl").read_text().splitlines()]
        documents = [text for text in documents if WORD.search(text)]
        kind = rooms.RULES.get("decontaminate")
        settings = kind.Settings(sets=[{"path": path, "documents": "line"} for path in args.sets])
        texts = [
            text
            for source, file in zip(settings.sets, kind.files(settings), strict=True)
            for where, record in formats.read_file(file, source)
            for text in _texts(where, record, source)
        ]
        rng = random.Random(0)
        changed, kinds = planted(documents, texts, rng)
        result = found(folder, args.tokenizer, changed, settings.model_dump(mode="json"), texts)
        rows = []
        for name_of in (*KINDS, "all"):
            of = [number for number, own in kinds.items() if name_of in (own, "all")]
            share = sum(number in result["left_out"] for number in of) / len(of)
            rows.append([name_of, f"{len(of):,}", f"{share:.4f}"])
        precision = 1 - len(result["wrong"]) / len(result["left_out"])
        others = sorted(result["left_out"] - set(kinds))
        rule = kind(settings)
        size = sum(len(text.encode()) for text in changed) / 1e6
        seconds = []
        for _ in range(3):
            blocks = [[Document(text) for text in changed[i : i + 500]] for i in range(0, len(changed), 500)]
            start = time.perf_counter()
            for block in blocks:
                rule.look(block)
                for document in block:
                    rule.apply(document)
            seconds.append(time.perf_counter() - start)
    head, about = __doc__.partition("\n\n    python")[0], __doc__.partition("NAME]\n")[2]
    of_sets = ", ".join(f"{name} ({count['texts']:,} texts)" for name, count in result["rule"]["sets"].items())
    pieces = [
        f"# decontamination\n\n{head}\n{about}",
        f"{args.machine}; {time.strftime('%Y-%m-%d')}; numpy {metadata.version('numpy')}; {len(changed):,} documents, "
        f"{size:.0f} MB; sets: {of_sets}.\n",
        table(["planted", "documents", "recall"], rows),
        f"\nLeft out: {len(result['left_out']):,}, precision {precision:.4f}. Of the documents without a planted text "
        f"{len(others):,} were left out.\nThe rule alone, one process: {size / min(seconds):.0f} MB/s, "
        f"{len(changed) / min(seconds):,.0f} documents/s.",
    ]
    RESULTS.joinpath("decontamination.md").write_text("\n".join(pieces) + "\n")
    print("\n".join(pieces))


if __name__ == "__main__":
    sys.exit(main())
