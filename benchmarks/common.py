"""Timing that stays honest on a shared machine, and the record of a run.

Contenders take turns within each round, so that a neighbour's burst of load hits all of them; a ratio is the median
over rounds of (time of the baseline in that round / time of the contender in that round). Absolute times are the
minimum: what the code needs when nobody disturbs it.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

RESULTS = Path(__file__).resolve().parent / "results"
# glibc gives big blocks back to the kernel on free, so each call's outputs are new pages, and faulting them in costs
# more than the loss. These keep them: what a program does that holds its buffers.
KEEP_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "1000000000"}


def arguments(
    description: str, rounds: int = 15, more: Callable[[argparse.ArgumentParser], object] = lambda parser: None
) -> argparse.Namespace:
    """What `more` adds, and --machine, --rounds, --threads, --keep-heap, --quick.

    With --keep-heap the process starts again under KEEP_HEAP.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--machine", default=default_machine(), help="how the record names this machine")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="for all contenders")
    parser.add_argument(
        "--keep-heap", action="store_true", help="let glibc keep freed memory: times without page faults"
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, 3 rounds, nothing recorded: does it run?")
    more(parser)
    args = parser.parse_args()
    if args.keep_heap and any(os.environ.get(k) != v for k, v in KEEP_HEAP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_HEAP})
    if args.quick:
        args.rounds = 3
    torch.set_num_threads(args.threads)  # the kernels and DeepSpeed follow: one OpenMP runtime serves all
    args.load_before = os.getloadavg()[0]
    return args


def default_machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores {platform.machine()}, {memory:.0f} GiB"


def interleave(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    warmup: int = 2,
    prepare: dict[str, Callable[[], object]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, in another order in each:
    who comes after whom finds other things in the caches.

    `prepare` runs before each, untimed.
    """
    names, shuffle = list(contenders), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(-warmup, rounds):
        shuffle(names)
        for name in names:
            if prepare:
                prepare[name]()
            start = time.perf_counter()
            contenders[name]()
            elapsed = time.perf_counter() - start
            if r >= 0:
                times[name].append(elapsed)
    return times


def speedup(times: dict[str, list[float]], baseline: str, name: str) -> float:
    """How many times faster than the baseline: median of the rounds' ratios."""
    return statistics.median(b / t for b, t in zip(times[baseline], times[name], strict=True))


def status(key: str, pid: int | str = "self") -> int:
    """Bytes of a process, by Linux's account: VmRSS: resident now, VmHWM: at most; RssAnon: of no file."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def peak_memory(work: Callable[[], object]) -> tuple[int, int]:
    """(resident bytes before, largest resident bytes during work()), of this process, by Linux's own account."""

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from the present resident set
    before = status("VmRSS:")
    result = work()
    peak = status("VmHWM:")
    del result
    return before, peak


def check(name: str, got: torch.Tensor, peer: torch.Tensor, truth: torch.Tensor, tiny: float) -> tuple[float, float]:
    """(our largest error, torch's) against float64.

    A benchmark of a wrong result is worth nothing, so it stops here.
    """
    ours = (got.double() - truth).abs().max().item()
    theirs = (peer.double() - truth).abs().max().item()
    if not ours <= 2 * theirs + tiny:
        raise SystemExit(f"{name}: error {ours:.3g} is more than twice torch's {theirs:.3g}; not timed")
    return ours, theirs


def record(
    name: str,
    args: argparse.Namespace,
    rows: list[dict],
    columns: dict[str, str],
    shown: list[dict] | None = None,
    place: str = "",
) -> None:
    """Appends the rows to results/<name>.jsonl, rewrites results/<name>.md from the last run of each setting,
    and prints it.

    shown: what the table is to hold instead of the rows, where they replace some of an earlier run's.
    place: the kind of machine, where the page is to keep one table for each.
    """
    from fastft import _C

    run = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": args.machine,
        "heap": "kept" if args.keep_heap else "default",
        "threads": args.threads,
        "load before": round(args.load_before, 1),  # of the last minute: what neighbours were doing
        "cpu_path": _C.cpu_path(),
        "compiler": _C.build_info()["compiler"],
        "python": platform.python_version(),
        **versions(("torch", "deepspeed")),
    }
    table = markdown(shown or rows, columns)
    print(table)
    if args.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps({**run, **row}) + "\n")
    forced = f", {os.environ['FASTFT_CPU']} forced" if "FASTFT_CPU" in os.environ else ""
    heading = f"## {args.threads} threads, heap {run['heap']}{forced}{place and ', ' + place}"
    _rewrite(RESULTS / f"{name}.md", name, heading, run, table)


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Of those that are installed."""
    return {package: metadata.version(package) for package in packages if _installed(package)}


def _installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    """A table: columns are keys of the rows with the format of their values; - where a row has none."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            format(row[key], spec) if key in row and row[key] is not None else "-" for key, spec in columns.items()
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _rewrite(path: Path, name: str, heading: str, run: dict, table: str) -> None:
    """One section per setting; the others stay."""
    sections: dict[str, str] = {}
    if path.exists():
        for part in path.read_text().split("\n## ")[1:]:
            title, _, body = part.partition("\n")
            sections["## " + title] = body.strip()
    facts = ", ".join(f"{k} {v}" for k, v in run.items() if k not in ("machine", "heap", "threads"))
    sections[heading] = f"{run['machine']}: {facts}\n\n{table.strip()}"
    intro = (
        f"# {name}\n\nWritten by `python benchmarks/{Path(sys.argv[0]).name}`. "
        "How times and ratios are taken: `benchmarks/common.py`.\n\n"
    )
    path.write_text(intro + "\n\n".join(f"{title}\n\n{body}" for title, body in sorted(sections.items())) + "\n")
