"""What becomes of a run when something breaks: the real fault, injected into real ranks under `fastft launch`,
over ZeRO stages and dtypes.

survived   the run ended by itself (or after one `fastft resume`, where the fault is meant to end it) with weights
           bit-identical to those of an undisturbed run; where "how" says what else is meant to happen, that happened
seen       seconds from the fault to the launcher's word about it, largest of the tries
lost       steps that had to be done again, largest of the tries; a checkpoint is written every 5 steps

    python benchmarks/faults.py [--machine NAME] [--tries 5] [--stages 0 1 2 3] [--only NAME ...]
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import common
from launched import STEPS, WATCHDOG, Bench, left, reached, wait_for, weights

from fastft import track
from fastft.launch.agent import find_rank
from fastft.launch.hostfile import free_port
from fastft.train.writer import POINTS

COLUMNS = {
    "fault": "s",
    "ZeRO": "s",
    "dtype": "s",
    "tries": "d",
    "survived": "d",
    "seen s": ".1f",
    "lost": "d",
    "how": "s",
}


@dataclass
class Outcome:
    survived: bool
    seen: float | None = None  # seconds
    lost: int = 0  # steps
    how: str = ""


def lost_steps(run: Path, at: int) -> int:
    """Steps done again after a fault at step ``at``: from the step that the last start began with."""
    return max(0, at - [r for r in track.read(run) if r["kind"] == "run"][-1]["start_step"])


def killed_rank(bench: Bench, zero: int, dtype: str) -> Outcome:
    """SIGKILL of a random rank at a random step."""
    truth, run, rank, step = (
        bench.undisturbed(zero, dtype),
        bench.run_dir(),
        random.randrange(bench.ranks),
        random.randrange(1, STEPS - 3),
    )
    process = bench.start("train", bench.config(run, zero, dtype))
    wait_for(lambda: reached(run) >= step, process)
    at, now = reached(run), time.time()
    os.kill(find_rank(run, rank), signal.SIGKILL)
    seen = process.when("was ended by SIGKILL") - now
    code = process.wait()
    return Outcome(code == 0 and weights(run) == truth, seen, lost_steps(run, at))


def killed_in_a_save(point: str) -> Callable[[Bench, int, str], Outcome]:
    """SIGKILL of rank 0 (of rank 1 where both pass) at one moment of a save."""

    def fault(bench: Bench, zero: int, dtype: str) -> Outcome:
        truth, run = bench.undisturbed(zero, dtype), bench.run_dir()
        rank = (
            0
            if point.startswith(("before-manifest", "before-rename", "before-latest", "before-prune"))
            else random.randrange(bench.ranks)
        )
        if zero == 0 and "file" in point:
            rank = 0  # the others write no more than their RNG state, which passes these points too, but later
        process = bench.start(
            "train", bench.config(run, zero, dtype), env={"FASTFT_KILL_AT": f"{point}:{rank}:{run}.marker"}
        )
        now_at = process.when("was ended by SIGKILL")
        at = reached(run)
        code = process.wait()
        return Outcome(
            code == 0 and weights(run) == truth and Path(f"{run}.marker").exists(),
            now_at - Path(f"{run}.marker").stat().st_mtime,
            lost_steps(run, at),
        )

    return fault


def stopped_rank(bench: Bench, zero: int, dtype: str) -> Outcome:
    """SIGSTOP of a rank: the watchdog names it and shows its stack."""
    truth, run, rank = bench.undisturbed(zero, dtype), bench.run_dir(), random.randrange(bench.ranks)
    process = bench.start("train", bench.config(run, zero, dtype))
    wait_for(lambda: reached(run) >= 3, process)
    at, now = reached(run), time.time()
    os.kill(find_rank(run, rank), signal.SIGSTOP)
    seen = process.when(f"rank {rank} on localhost has taken no step") - now
    named = any(
        f"rank {rank} on localhost has taken no step" in line and "it is stopped" in line for _, line in process.said
    )
    code = process.wait()
    return Outcome(
        code == 0 and named and weights(run) == truth, seen, lost_steps(run, at), f"watchdog {WATCHDOG:.0f} s"
    )


def killed_launcher(bench: Bench, zero: int, dtype: str) -> Outcome:
    """SIGKILL of the launcher: no rank stays; resume ends as if nothing had been.

    Seen: until the last process is gone.
    """
    truth, run = bench.undisturbed(zero, dtype), bench.run_dir()
    process = bench.start("train", bench.config(run, zero, dtype))
    wait_for(lambda: reached(run) >= 7, process)
    at, now = reached(run), time.time()
    process.popen.kill()
    process.popen.wait()
    while left(run) and time.time() - now < 30:
        time.sleep(0.05)
    seen = time.time() - now
    again = bench.start("resume", run)
    code = again.wait()
    return Outcome(
        seen < 10 and process.popen.returncode != 0 and code == 0 and weights(run) == truth,
        seen,
        lost_steps(run, at),
        "then resume",
    )


def terminated(bench: Bench, zero: int, dtype: str) -> Outcome:
    """SIGTERM while one rank is stopped, so that the others wait inside a collective; it goes on a second later.

    Seen: until all is saved and left.
    """
    truth, run, rank = bench.undisturbed(zero, dtype), bench.run_dir(), random.randrange(bench.ranks)
    process = bench.start("train", bench.config(run, zero, dtype))
    wait_for(lambda: reached(run) >= 4, process)
    pid = find_rank(run, rank)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(0.3)
    now = time.time()
    process.popen.send_signal(signal.SIGTERM)
    time.sleep(1.0)
    os.kill(pid, signal.SIGCONT)
    code = process.wait(60)
    seen, at = time.time() - now, reached(run)
    again = bench.start("resume", run)
    done = again.wait()
    return Outcome(
        code == 143 and seen < 30 and done == 0 and weights(run) == truth,
        seen,
        lost_steps(run, at),
        "exit 143, then resume",
    )


def broken_disk(kind: str) -> Callable[[Bench, int, str], Outcome]:
    """A disk (a tmpfs) that is full, or read-only, at the second save:
    all ranks end with its name, the first checkpoint stays. Needs root.
    """

    def fault(bench: Bench, zero: int, dtype: str) -> Outcome:
        truth, run = bench.undisturbed(zero, dtype), bench.run_dir()
        disk = run / "checkpoints"
        disk.mkdir(parents=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", disk], check=True)
        try:
            process = bench.start("train", bench.config(run, zero, dtype), "checkpoint.every=10", max_restarts=0)
            wait_for(lambda: (disk / "step-10" / "MANIFEST.json").exists(), process)
            if kind == "full":
                used = sum(f.stat().st_size for f in disk.rglob("*") if f.is_file())
                subprocess.run(["mount", "-o", f"remount,size={int(used * 1.3)}", disk], check=True)
            else:
                subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
            code = process.wait()
            kept = sorted(p.name for p in disk.glob("step-*") if (p / "MANIFEST.json").exists())
            told = "needs" in process.text() if kind == "full" else "Read-only" in process.text()
            subprocess.run(["mount", "-o", "remount,rw,size=256m", disk], check=True)
            done = bench.start("resume", run).wait()
            return Outcome(
                code not in (0, None) and told and "step-10" in kept and done == 0 and weights(run) == truth,
                None,
                lost_steps(run, 20),
                "named, then resume",
            )
        finally:
            subprocess.run(["umount", "-l", disk], check=False)

    return fault


def hanging_disk(bench: Bench, zero: int, dtype: str) -> Outcome:
    """A disk (an ext4 image) that stops to answer (fsfreeze) in the middle of a run:
    the watchdog sees that no save gets on. Needs root and loop devices.
    """
    truth, run = bench.undisturbed(zero, dtype), bench.run_dir()
    disk, image = run / "checkpoints", Path(f"{run}.img")
    disk.mkdir(parents=True)
    with open(image, "wb") as f:
        f.truncate(256 << 20)
    subprocess.run(["mkfs.ext4", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, disk], check=True)
    frozen = False
    try:
        (disk / "lost+found").rmdir()
        process = bench.start("train", bench.config(run, zero, dtype), "checkpoint.every=10")
        wait_for(lambda: (disk / "step-10" / "MANIFEST.json").exists(), process)
        at, now = reached(run), time.time()
        subprocess.run(["fsfreeze", "-f", disk], check=True)
        frozen = True
        seen = process.when("waits for a disk") - now
        code = process.wait()
        told = "cannot be ended" in process.text()
        subprocess.run(["fsfreeze", "-u", disk], check=True)
        frozen = False
        while left(run) and time.time() - now < 60:
            time.sleep(0.05)
        still = left(run)
        done = bench.start("resume", run).wait()
        return Outcome(
            code == 137 and told and not still and done == 0 and weights(run) == truth,
            seen,
            lost_steps(run, at),
            f"watchdog {WATCHDOG:.0f} s, then resume",
        )
    finally:
        if frozen:
            subprocess.run(["fsfreeze", "-u", disk], check=False)
        subprocess.run(["umount", "-l", disk], check=False)


def always_crashing(bench: Bench, zero: int, dtype: str) -> Outcome:
    """A rank that is killed at every start: a bounded number of tries,
    each after a longer wait, then the true exit code.
    """
    run = bench.run_dir()
    process = bench.start("train", bench.config(run, zero, dtype), env={"FASTFT_KILL_AT": "begin:1"}, max_restarts=2)
    code = process.wait()
    waits = [line for _, line in process.said if "launch: restart" in line]
    return Outcome(
        code == 137 and len(waits) == 2 and "giving up" in process.text() and not left(run),
        None,
        0,
        f"exit {code} after {len(waits)} restarts",
    )


def slow_rank(bench: Bench, zero: int, dtype: str) -> Outcome:
    """A rank that is stopped three quarters of the time: named within 20 steps. lost: those steps."""
    run, rank = bench.run_dir(), random.randrange(bench.ranks)
    process = bench.start("train", bench.config(run, zero, dtype, steps=4 * STEPS, log_every=10))
    wait_for(lambda: reached(run) >= 10, process)
    start, now, pid = reached(run), time.time(), find_rank(run, rank)
    found: list[dict] = []
    while not found and process.popen.poll() is None and reached(run) < start + 60:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.06)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.02)
        found = [r for r in track.read(run) if r["kind"] == "slow_ranks" and str(rank) in r["times"]]
    seen = time.time() - now
    process.popen.send_signal(signal.SIGTERM)
    process.wait()
    return Outcome(
        bool(found) and found[0]["step"] <= start + 20,
        seen,
        found[0]["step"] - start if found else 0,
        "lost: steps until it was named",
    )


def damaged(kind: str) -> Callable[[Bench, int, str], Outcome]:
    """A random file of the newest checkpoint with a bit flipped, cut short, or gone:
    found before use, and the checkpoint before is taken.
    """

    def fault(bench: Bench, zero: int, dtype: str) -> Outcome:
        truth, run = bench.undisturbed(zero, dtype), bench.run_dir()
        shutil.copytree(bench.whole[zero, dtype], run, ignore=shutil.ignore_patterns("model"))
        newest = run / "checkpoints" / f"step-{STEPS}"
        file = random.choice(sorted(f for f in newest.rglob("*") if f.is_file()))
        if kind == "missing":
            file.unlink()
        else:
            content = bytearray(file.read_bytes())
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
            file.write_bytes(content if kind == "bit flip" else content[:-1])
        process = bench.start("resume", run)
        code = process.wait()
        return Outcome(
            code == 0 and weights(run) == truth and file.name in process.text(),
            None,
            lost_steps(run, STEPS),
            "the one before is taken",
        )

    return fault


def injected(run: Path, code: str) -> dict[str, str]:
    """The environment of processes that run ``code`` at their start: Python imports a sitecustomize in PYTHONPATH."""
    folder = Path(f"{run}-injected")
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))}


POISON = """
import os

if os.environ.get("RANK") == "1":
    import torch

    calls = 0

    def poison(module, given, output):
        global calls
        if type(module).__name__ == "LlamaMLP":
            calls += 1
            if {begin} <= calls < {end}:
                return output * float("nan")

    torch.nn.modules.module.register_module_forward_hook(poison)
"""


def poisoned(begin: int, end: int) -> Callable[[Bench, int, str], Outcome]:
    """NaN out of one rank's layers (two to a step) from one call on: the step is skipped on all ranks;
    after more than max_skipped in a row, the run stops.
    """

    def fault(bench: Bench, zero: int, dtype: str) -> Outcome:
        run = bench.run_dir()
        env = injected(run, POISON.format(begin=begin, end=end))
        process = bench.start("train", bench.config(run, zero, dtype, max_skipped=3), env=env, max_restarts=0)
        code = process.wait()
        skipped = [r for r in track.read(run) if r["kind"] == "skipped"]
        named = all(len(r["samples"]) == 8 for r in skipped)
        if end - begin <= 2:
            return Outcome(
                code == 0 and named and len(skipped) == 1 and finite(run / "model" / "model.safetensors"),
                None,
                len(skipped),
                "skipped on all ranks; finite",
            )
        return Outcome(
            code == 1 and named and len(skipped) == 4 and "4 steps in a row had NaN" in process.text(),
            None,
            len(skipped),
            "stopped, samples named",
        )

    return fault


# Rank {rank} is killed at the {call}th call of a function, once.
KILLED = """
import os
import signal

if os.environ.get("RANK") == "{rank}" and not os.path.exists({marker!r}):
    from {module} import {owner} as owner

    original, calls = owner.{name}, 0

    def killed(*args, **kwargs):
        global calls
        calls += 1
        if calls == {call}:
            open({marker!r}, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    owner.{name} = killed
"""


def killed_in(where: str, rank: int, call: int) -> Callable[[Bench, int, str], Outcome]:
    """SIGKILL of a rank inside ``module:owner.name``; what it began is not taken for whole, and the run goes on."""

    def fault(bench: Bench, zero: int, dtype: str) -> Outcome:
        truth, run = bench.undisturbed(zero, dtype), bench.run_dir()
        marker = Path(f"{run}.marker")
        module, _, rest = where.partition(":")
        owner, _, name = rest.rpartition(".")
        text = KILLED.format(rank=rank, marker=str(marker), module=module, owner=owner, name=name, call=call)
        process = bench.start("train", bench.config(run, zero, dtype), env=injected(run, text))
        now_at = process.when("was ended by SIGKILL")
        half = (run / "model").exists() and weights(run) != truth
        at, code = reached(run), process.wait()
        survived = code == 0 and not half and weights(run) == truth and not list(run.glob(".model*"))
        return Outcome(survived, now_at - marker.stat().st_mtime, lost_steps(run, at))

    return fault


def weight_file(kind: str) -> Callable[[Bench, int, str], Outcome]:
    """A file of the model that is cut short, or gone: all ranks end before the first step, with its name."""

    def fault(bench: Bench, zero: int, dtype: str) -> Outcome:
        from transformers import AutoModelForCausalLM

        run = bench.run_dir()
        folder = Path(f"{run}-model")
        shutil.copytree(bench.folder / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
        AutoModelForCausalLM.from_pretrained(bench.folder / "model").save_pretrained(folder, max_shard_size="100KB")
        file = sorted(folder.glob("*.safetensors"))[1]
        if kind == "missing":
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-100])
        process = bench.start("train", bench.config(run, zero, dtype), f"model.path={folder}", max_restarts=0)
        code = process.wait()
        told = f"{file.name} {'is missing' if kind == 'missing' else 'has'}" in process.text()
        return Outcome(code == 1 and told and not reached(run) and not left(run), None, 0, "named, nothing trained")

    return fault


# A rank's memory is at its limit; the next large tensor finds none.
FULL = """
import os

if os.environ.get("RANK") == "1":
    import resource

    import torch

    calls = 0

    def fill(module, given):
        global calls
        if type(module).__name__ == "LlamaMLP":
            calls += 1
            if calls == 25:
                resource.setrlimit(resource.RLIMIT_AS, (1 << 35, 1 << 35))
                torch.empty(1 << 36, dtype=torch.uint8)

    torch.nn.modules.module.register_module_forward_pre_hook(fill)
"""


def out_of_memory(bench: Bench, zero: int, dtype: str) -> Outcome:
    """One rank finds no memory in a forward: all ranks end, and it is said what to lower."""
    run = bench.run_dir()
    process = bench.start("train", bench.config(run, zero, dtype), env=injected(run, FULL), max_restarts=0)
    code = process.wait()
    told = "out of memory" in process.text() and "Lower batch.micro_tokens" in process.text()
    return Outcome(code == 1 and told and not left(run), None, 0, "said what to lower")


def finite(file: Path) -> bool:
    from safetensors.torch import load_file

    return all(bool(tensor.isfinite().all()) for tensor in load_file(file).values())


def differing(key: str, values: tuple) -> Callable[[Bench, int, str], Outcome]:
    """Two ranks that were given other settings: both refuse before the first step, and name the rank."""

    def fault(bench: Bench, zero: int, dtype: str) -> Outcome:
        run = bench.run_dir()
        path = bench.config(run, zero, dtype)
        port = free_port()
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "fastft", "train", str(path), f"{key}={value}"],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": "1",
                    "RANK": str(r),
                    "LOCAL_RANK": str(r),
                    "WORLD_SIZE": "2",
                    "LOCAL_WORLD_SIZE": "2",
                    "LOCAL_SIZE": "2",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                },
            )
            for r, value in enumerate(values)
        ]
        try:
            said = [rank.communicate(timeout=120)[0] for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        return Outcome(
            all(rank.returncode == 1 for rank in ranks)
            and all("rank 1 has" in text for text in said)
            and reached(run) == 0,
            None,
            0,
            "refused",
        )

    return fault


FAULTS: dict[str, Callable[[Bench, int, str], Outcome]] = {
    "rank killed": killed_rank,
    "rank stopped": stopped_rank,
    "launcher killed": killed_launcher,
    "SIGTERM in a collective": terminated,
    "disk full": broken_disk("full"),
    "disk read-only": broken_disk("read-only"),
    "disk hangs": hanging_disk,
    "crash at every start": always_crashing,
    "slow rank": slow_rank,
    **{f"checkpoint file: {kind}": damaged(kind) for kind in ("bit flip", "cut short", "missing")},
    "NaN on one rank": poisoned(21, 23),
    "NaN on one rank for good": poisoned(21, 1 << 60),
    "ranks differ: learning rate": differing("optim.lr", (1e-3, 2e-3)),
    "ranks differ: seed": differing("run.seed", (1, 2)),
    **{f"killed in a save: {point}": killed_in_a_save(point) for point in POINTS},
    "killed while it loads": killed_in("deepspeed.runtime.zero.partition_parameters:Init._aligned_size", 1, 9),
    "killed in the export": killed_in("fastft.models:weight_files.raw", 0, 9),
    **{f"weight file: {kind}": weight_file(kind) for kind in ("cut short", "missing")},
    "out of memory on one rank": out_of_memory,
}
MORE = ("rank killed", "checkpoint file")  # tried several times: they fall on random steps and files
ONCE = (
    "crash at every start",
    "slow rank",
    "disk full",
    "disk read-only",
    "disk hangs",
    "ranks differ: learning rate",
    "ranks differ: seed",
    "weight file: cut short",
    "weight file: missing",
    "out of memory on one rank",
)  # the same at every stage: not tried at all of them


def attempt(fault: Callable[[Bench, int, str], Outcome], bench: Bench, zero: int, dtype: str) -> Outcome:
    """One try; what did not come to its end was not survived, leaves nothing running, and the others go on."""
    try:
        return fault(bench, zero, dtype)
    except (AssertionError, OSError, subprocess.SubprocessError) as e:
        return Outcome(False, None, 0, f"{type(e).__name__}: {e}".splitlines()[0][:80])
    finally:
        bench.end_all()


def measure(bench: Bench, name: str, zero: int, dtype: str, tries: int) -> dict:
    outcomes = [attempt(FAULTS[name], bench, zero, dtype) for _ in range(tries)]
    seen = [o.seen for o in outcomes if o.seen is not None]
    row = {
        "fault": name,
        "ZeRO": str(zero),
        "dtype": dtype,
        "tries": tries,
        "survived": sum(o.survived for o in outcomes),
        "seen s": max(seen) if seen else None,
        "lost": max(o.lost for o in outcomes),
        "how": outcomes[-1].how,
    }
    if seen:
        row["seen median s"] = statistics.median(seen)
    return row


def merged(rows: list[dict]) -> list[dict]:
    """The newest row of every fault, stage and dtype, in the order of the table."""
    newest: dict[tuple, dict] = {}
    for row in [*map(json.loads, (common.RESULTS / "faults.jsonl").read_text().splitlines()), *rows]:
        newest[row["ZeRO"], row["fault"], row["dtype"]] = row
    order = list(FAULTS)
    return sorted(
        (row for row in newest.values() if row["fault"] in order),
        key=lambda row: (row["ZeRO"], order.index(row["fault"])),
    )


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--tries", type=int, default=5)
        parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
        parser.add_argument(
            "--update",
            action="store_true",
            help="the table keeps the rows of results/faults.jsonl that this run does not measure again",
        )
        parser.add_argument("--only", nargs="+", choices=list(FAULTS), default=list(FAULTS))

    args = common.arguments(__doc__.splitlines()[0], more=more)
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for zero in args.stages:
            dtype, stage = "fp32" if zero % 2 == 0 else "bf16", []
            for name in args.only:
                if (name in ONCE and zero != args.stages[0]) or (name.startswith("disk") and os.geteuid()):
                    continue
                tries = args.tries if name.startswith(MORE) else 1
                stage.append(measure(bench, name, zero, dtype, tries))
                print(stage[-1], flush=True)
            rows += stage
            if not args.quick:  # after each stage: the whole takes half an hour
                common.record("faults", args, stage, COLUMNS, merged(stage) if args.update else rows)
    if bad := [r for r in rows if r["survived"] < r["tries"]]:
        raise SystemExit(f"not survived: {bad}")


if __name__ == "__main__":
    main()
