"""How much of packed sequences is empty: best-fit decreasing against packing in the order of the documents.

    python benchmarks/packing.py --tokenizer FOLDER CORPUS ... [--machine NAME]

Every corpus is a file or folder of texts, documents between blank lines, long ones split (data.truncation: split).
``waste``: share of positions that hold no token, the last sequence included. ``next-fit``: the documents in their
order, a new sequence where the next does not fit. ``bound``: no packing of these pieces can waste less (Martello
and Toth 1990, L2).
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import numpy as np
from common import RESULTS, default_machine

from fastft import assemble
from fastft import config as configuration

LENGTHS = (512, 1024, 2048)


def measure(tokenizer: str, corpus: Path, length: int, cache: Path) -> dict:
    data = {"train": str(corpus), "max_length": length, "truncation": "split", "cache": str(cache / str(length))}
    raw = {"task": "causal_lm", "model": {"path": tokenizer}, "data": data, "run": {"offline": True, "device": "cpu"}}
    task = assemble.start(configuration.validate(raw)).task
    split = task.train_split()
    pieces = np.asarray(split.data["piece_length"])
    tokens, packs = int(split.totals["tokens"]), len(split)
    return {
        "corpus": corpus.name,
        "max_length": length,
        "documents": len(split.data["tokens"]),
        "pieces": len(pieces),
        "tokens": tokens,
        "sequences": packs,
        "waste": 1 - tokens / (packs * length),
        "bound": 1 - tokens / (least(pieces, length) * length),
        "next_fit": 1 - tokens / (next_fit(pieces, length) * length),
    }


def next_fit(pieces: np.ndarray, length: int) -> int:
    """Sequences when documents are packed as they come."""
    sequences, room = 0, 0
    for piece in pieces.tolist():
        if piece > room:
            sequences, room = sequences + 1, length
        room -= piece
    return sequences


def least(pieces: np.ndarray, length: int) -> int:
    """Sequences that any packing needs: those of pieces above half of one, which cannot share one, and what is left of
    pieces of at least ``small`` tokens, for the worst ``small``.
    """
    found = -(-int(pieces.sum()) // length)
    for small in np.unique(pieces[pieces <= length // 2]).tolist():
        large, middle = pieces > length - small, (pieces <= length - small) & (pieces > length // 2)
        rest = int(pieces[(pieces <= length // 2) & (pieces >= small)].sum())
        room = int(middle.sum()) * length - int(pieces[middle].sum())
        found = max(found, int(large.sum()) + int(middle.sum()) + max(0, -(-(rest - room) // length)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpora", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--machine", default=default_machine())
    parser.add_argument("--out", type=Path, default=RESULTS / "packing.md")
    args = parser.parse_args()
    lines = ["# packing", "", *__doc__.split("\n\n")[0::2], f"{args.machine}; python {platform.python_version()}", ""]
    lines += ["| corpus | max_length | documents | pieces | tokens | sequences | waste | bound | next-fit |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    with tempfile.TemporaryDirectory() as folder:
        for corpus in args.corpora:
            for length in LENGTHS:
                row = measure(args.tokenizer, corpus, length, Path(folder) / corpus.name)
                print(json.dumps(row), flush=True)
                counts = [f"{row[name]:,}" for name in ("documents", "pieces", "tokens", "sequences")]
                shares = [f"{row[name]:.3%}" for name in ("waste", "bound", "next_fit")]
                lines.append("| " + " | ".join([row["corpus"], str(length), *counts, *shares]) + " |")
    args.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
