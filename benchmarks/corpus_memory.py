"""Memory that `fastft prepare` takes, by the size of its input; how long a training on a large corpus takes to start.

    python benchmarks/corpus_memory.py --tokenizer FOLDER --texts FILE.txt.gz ... [--sizes 20,200,2000] [--only memory]

Memory: documents as benchmarks/corpus.py puts them together, one JSON Lines file, two workers, the rules unicode,
whitespace and length, duplicates ``exact`` and ``near``. Of the first process and of each that it starts RssAnon (of
/proc/PID/status; what is mapped from files is not in it, and can be dropped by the kernel) is read every 20 ms, and
VmHWM. Given are the peak of the sum of all, less what as many processes take that only import what these do, and the
highest of one process. Allowed are 500 MB, and 100 bytes a document.

Start: seconds from the command `fastft train` to the end of its only step, of a tiny Llama, on a corpus of 10^6 tokens
and one of 10^9 (random ones in documents of 1,000; sequences of 1,024), in turn, 5 times: the first one on a corpus,
which plans the packs, and the next. Of both the median, and the median of the differences in each round; "of computing"
is user and system time of the whole command.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path

import common
import large
from corpus import write_documents

from fastft import track

ROOT = Path(__file__).resolve().parent.parent
EVERY = 0.02  # seconds between two looks
ALLOWED, EACH = 500e6, 100  # bytes; bytes a document
EACH_OF = 1000  # tokens of a random document
# What the first process and the others import; gigatoken with what it needs.
IMPORTS = {
    "first": "import fastft.cli.main, fastft.models.load, tokenizers, gigatoken, transformers;"
    "from fastft.corpus import build, progress, told; transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast",
    "worker": "import fastft.corpus.pool, fastft.corpus.work, tokenizers, gigatoken",
}


class Watch(threading.Thread):
    """RssAnon of a process and all that it has started: peaks of the sum and of each, bytes; VmHWM of each."""

    def __init__(self, pid: int):
        super().__init__(daemon=True)
        self.pid, self.sum = pid, 0
        self.peaks: dict[int, int] = {}
        self.resident: dict[int, int] = {}
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(EVERY):
            self.read()

    def read(self) -> None:
        now = {}
        for pid in tree(self.pid):
            try:
                now[pid] = common.status("RssAnon:", pid)
                self.resident[pid] = common.status("VmHWM:", pid)
            except (OSError, StopIteration):  # it ended between the two
                continue
            self.peaks[pid] = max(self.peaks.get(pid, 0), now[pid])
        self.sum = max(self.sum, sum(now.values()))


def tree(pid: int, above: bytes = b"") -> list[int]:
    """A process and those that it has started; none that is about to be another program, with its parent's memory."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        below = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    if command == above:
        return []
    return [pid, *(one for child in map(int, below) for one in tree(child, command))]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def only_imports(kind: str) -> int:
    """RssAnon of a process that imports, bytes."""
    code = f"{IMPORTS[kind]}\nimport re\nprint(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    found = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    return int(found.stdout.split()[-1]) * 1024


def prepared(folder: Path, tokenizer: str, duplicates: str) -> dict:
    """Prepare it in processes of its own."""
    config = {
        "output": str(folder / "out"),
        "tokenizer": tokenizer,
        "sources": {"path": str(folder / "all.jsonl"), "name": "texts"},
        "rules": ["unicode", "whitespace", "length"],
        "duplicates": duplicates,
        "workers": 2,
    }
    (folder / "corpus.yaml").write_text(json.dumps(config))
    command = [sys.executable, "-m", "fastft", "prepare", str(folder / "corpus.yaml"), "--overwrite", "--json"]
    start = time.perf_counter()
    with open(folder / "said", "w") as said:
        process = subprocess.Popen(command, env=environment(), stdout=said)
        watch = Watch(process.pid)
        watch.start()
        code = process.wait()
    watch.done.set()
    assert code == 0, "fastft prepare failed"
    totals = json.loads((folder / "said").read_text().splitlines()[-1])["totals"]
    workers = [peak for pid, peak in watch.peaks.items() if pid != process.pid]
    return {
        "seconds": time.perf_counter() - start,
        "tokens": totals["tokens"],
        "sum": watch.sum,
        "first": watch.peaks[process.pid],
        "worker": max(workers, default=0),
        "processes": len(watch.peaks),
        "resident": max(watch.resident.values()),
    }


def memory(args: argparse.Namespace, folder: Path) -> list[dict]:
    rows = []
    base = {kind: only_imports(kind) for kind in IMPORTS}
    for size in args.sizes:
        documents = write_documents(folder / "all.jsonl", args.texts, 1 << 20, round(size * 1e6))
        for duplicates in args.duplicates:
            found = prepared(folder, args.tokenizer, duplicates)
            imports = base["first"] + (found["processes"] - 1) * base["worker"]
            row = {"MB": size, "documents": documents, "duplicates": duplicates, **found, "imports": imports}
            rows.append(row | {"above": found["sum"] - imports, "allowed": ALLOWED + EACH * documents})
            print({k: round(v / 1e6) if isinstance(v, int | float) and v > 1e6 else v for k, v in rows[-1].items()})
            sys.stdout.flush()
    (folder / "all.jsonl").unlink(missing_ok=True)
    return rows


def imported(folder: Path, model: Path, tokens: int) -> Path:
    """A corpus of random tokens in documents of ``EACH_OF``, by `fastft import-tokens`."""
    import numpy as np

    folder.mkdir()
    values = np.random.default_rng(0).integers(2, 500, tokens, dtype=np.uint16)
    (folder / "in.ds").write_bytes(values.tobytes())
    (folder / "in.ds.index").write_bytes(np.arange(EACH_OF, tokens + 1, EACH_OF).astype("<u8").tobytes())
    command = [sys.executable, "-m", "fastft", "import-tokens", str(folder / "out"), str(folder / "in.ds")]
    command += ["--tokenizer", str(model), "--unchecked"]
    subprocess.run(command, env=environment(), stdout=subprocess.DEVNULL, check=True)
    return folder / "out"


def larger(small: Path, output: Path, tokens: int) -> Path:
    """Another corpus of random tokens, by the writer of shards alone: nothing is decoded. Its manifest is the small
    one's, with other shards.
    """
    import numpy as np

    from fastft.corpus import output as written
    from fastft.corpus.importing import SHARD_TOKENS
    from fastft.corpus.manifest import summed
    from fastft.corpus.shards import MANIFEST, Corpus, ShardWriter, as_json
    from fastft.corpus.work import Done
    from fastft.files import digest

    rng, corpus, shards, first = np.random.default_rng(1), Corpus(small), [], 0
    output.mkdir()
    for begin in range(0, tokens, SHARD_TOKENS):
        count = min(SHARD_TOKENS, tokens - begin) // EACH_OF
        writer = ShardWriter(output / ".shard", output / "shards" / f"{len(shards):05d}", 0, corpus.dtype.str)
        places = np.stack([np.zeros(count, np.int64), first + 1 + np.arange(count)], axis=1)
        ids = [number.to_bytes(16, "big") for number in range(first, first + count)]
        values = rng.integers(2, 500, count * EACH_OF, dtype=corpus.dtype)
        lengths = np.full(count, EACH_OF)
        writer.append(Done(places, [""] * count, ids, values, lengths, lengths, {}))
        shards.append(writer.close())
        first += count
    totals = summed(shards)
    sources = [source | totals for source in corpus.manifest["sources"]]
    manifest = corpus.manifest | {"totals": totals, "sources": sources, "shards": as_json(shards), "key": "random"}
    written.write(output / MANIFEST, {**manifest, "digest": digest(manifest)})
    return output


def started(folder: Path, corpus: Path, model: Path) -> tuple[float, float]:
    """Seconds from the command to the end of its first step, in a new run folder; what the run before it has prepared
    of the corpus is there. And seconds that the command computes in all.
    """
    run = folder / "run"
    config = {
        "task": "causal_lm",
        "model": {"path": str(model)},
        "data": {"train": str(corpus), "max_length": 1024, "truncation": "split", "cache": str(folder / "cache")},
        "batch": {"size": 1},
        "optim": {"lr": 1e-4},
        "train": {"steps": 1, "log_every": 1},
        "checkpoint": {"every": None},
        "run": {"dir": str(run), "offline": True, "device": "cpu", "threads": 1},
    }
    (folder / "run.yaml").write_text(json.dumps(config))
    shutil.rmtree(run, ignore_errors=True)
    command = [sys.executable, "-m", "fastft", "train", str(folder / "run.yaml")]
    begin, before = time.time(), computed()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    step = next(record for record in track.read(run) if record["kind"] == "train")
    return step["time"] - begin, computed() - before


def computed() -> float:
    """Seconds of user and system time of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def start(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Both in turn, ``rounds`` times after one that makes what is kept."""
    model = folder / "tiny"
    large.write_model(model, large.SMALL, "float32", large.tokens_of(500))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    corpora = {1_000_000: imported(folder / "small", model, 1_000_000)}
    corpora[args.tokens] = larger(corpora[1_000_000], folder / "large", args.tokens)
    seconds: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for tokens, corpus in corpora.items():
            shutil.rmtree(folder / str(tokens), ignore_errors=True)
            (folder / str(tokens)).mkdir()
            for kind in ("first", "next"):
                seconds.setdefault((tokens, kind), []).append(started(folder / str(tokens), corpus, model))
                print(f"start: {tokens:,} tokens, {kind}, {seconds[tokens, kind][-1]} s", flush=True)
    rows = []
    for (tokens, kind), times in seconds.items():
        wall, cpu = zip(*times, strict=True)
        rows.append({"tokens": tokens, "kind": kind, "wall": wall, "cpu": cpu})
        if tokens == args.tokens:
            small = next(row for row in rows if row["kind"] == kind)
            for name in ("wall", "cpu"):
                pairs = zip(small[name], rows[-1][name], strict=True)
                rows[-1][f"more {name}"] = statistics.median(b - a for a, b in pairs)
    return rows


def markdown(args: argparse.Namespace, kept: list[dict], begun: list[dict]) -> str:
    names = ("numpy", "tokenizers", "transformers", "gigatoken", "torch")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    head = __doc__.partition("\n\n    python")[0] + "\n\n" + __doc__.partition("memory]\n")[2].strip()
    out = ["# corpus_memory", "", head, "", f"{args.machine}; {time.strftime('%Y-%m-%d')}; {versions}", ""]
    columns = "MB of input | documents | duplicates | processes | sum above imports, MB | allowed | highest of one "
    columns += "process | of a worker | imports of all | highest VmHWM"
    out += [f"| {columns} |", "|" + "---|" * 10]
    for row in kept:
        mb = {key: f"{row[key] / 1e6:,.0f}" for key in ("above", "allowed", "first", "worker", "imports", "resident")}
        cells = [f"{row['MB']:,.0f}", f"{row['documents']:,}", row["duplicates"], row["processes"], *mb.values()]
        out.append("| " + " | ".join(map(str, cells)) + " |")
    out += [
        "",
        "| tokens | start | seconds to the first step | lowest to highest | more than 10^6 | of computing | more |",
        "|" + "---|" * 7,
    ]
    for row in begun:
        more = [f"{row[f'more {kind}']:+.2f}" if "more wall" in row else "-" for kind in ("wall", "cpu")]
        wall, cpu = statistics.median(row["wall"]), statistics.median(row["cpu"])
        span = f"{min(row['wall']):.2f} to {max(row['wall']):.2f}"
        out.append(f"| {row['tokens']:,} | {row['kind']} | {wall:.2f} | {span} | {more[0]} | {cpu:.2f} | {more[1]} |")
    return "\n".join(out) + "\n"


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tokenizer", required=True)
        parser.add_argument("--texts", nargs="+", required=True)
        parser.add_argument("--sizes", type=lambda s: [float(n) for n in s.split(",")], default=[20, 200, 2000])
        parser.add_argument("--duplicates", type=lambda s: s.split(","), default=["exact", "near"])
        parser.add_argument("--tokens", type=int, default=10**9)
        parser.add_argument("--only", choices=["memory", "start"])

    args = common.arguments(__doc__.splitlines()[0], rounds=5, more=more)
    if args.quick:
        args.sizes, args.tokens, args.rounds = [0.2], 10**7, 1
    path = common.RESULTS / "corpus_memory.jsonl"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = memory(args, folder) if args.only != "start" else []
        begun = start(args, folder) if args.only != "memory" else []
    if args.quick:
        return
    rows = {}  # what was not measured this time stays as it was
    for row in [
        *(json.loads(line) for line in (path.read_text().splitlines() if path.exists() else ())),
        *kept,
        *begun,
    ]:
        rows[row.get("MB", 0.0), row.get("duplicates") or row["kind"], row["tokens"] if "MB" not in row else 0] = row
    rows = [row for _, row in sorted(rows.items())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.with_suffix(".md").write_text(
        markdown(args, *([r for r in rows if ("MB" in r) == big] for big in (True, False)))
    )


if __name__ == "__main__":
    main()
