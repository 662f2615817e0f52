"""`fastft preflight`: whether these hosts can train together, before a job on them hangs or comes out wrong."""

import json
import os
import signal
import statistics
import subprocess
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from fastft.launch.hostfile import Host, address
from fastft.launch.launcher import Plan, remote_command

UNUSABLE = "cannot be imported"  # in a version, as the probe says it
MAX_SKEW = 1.0  # seconds between clocks
MIN_BANDWIDTH = 0.8  # of the median of all pairs
MIN_SHM = 1 << 30  # bytes of /dev/shm: what data loaders and NCCL's shared-memory transport expect
SENDING = 0.5  # seconds that a host sends to the next: in less, a pause of the operating system shows as a slow link
AGAIN = 5  # times that what looks slow is measured again
LIMIT = 60.0  # seconds for an answer: nvidia-smi, or a dead network disk, can hang for good
# Of probe.facts.
NEEDED = {
    "python",
    "packages",
    "code",
    "gpus",
    "shm",
    "port_free",
    "inputs",
    "shared",
    "disk_error",
    "disk_free",
    "disk_write",
}


class Probe:
    """A conversation with one host."""

    def __init__(self, plan: Plan, host: Host):
        self.host = host
        self.process = subprocess.Popen(
            remote_command(plan, host, "fastft.launch.probe"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        stdin, stdout, stderr = self.process.stdin, self.process.stdout, self.process.stderr
        assert stdin is not None and stdout is not None and stderr is not None  # pipes
        self.stdin, self.stdout, self.stderr = stdin, stdout, stderr

    def ask(self, **order) -> dict:
        """The answer; ``error`` in it when there is none within LIMIT."""
        late = threading.Event()

        def stop() -> None:
            late.set()
            self.kill()

        limit = threading.Timer(LIMIT, stop)
        limit.start()
        other = ""
        try:
            with suppress(OSError):
                self.stdin.write(json.dumps(order) + "\n")
                self.stdin.flush()
                for line in self.stdout:
                    if isinstance(answer := _json(line), dict):
                        return answer
                    other = line.strip() or other  # what a login shell prints
            if late.is_set():
                return {"error": f"no answer to '{order['do']}' within {LIMIT:.0f} s: a hanging driver or disk?"}
            said = self.stderr.read().strip().splitlines() or [other]
            return {"error": said[-1] or f"no answer (exit code {self.process.wait()})"}
        finally:
            limit.cancel()

    def kill(self) -> None:
        """The process and what it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        with suppress(OSError):  # what was not read by a process that is gone
            self.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.kill()


def preflight(plan: Plan, need_bytes: int, inputs: list[Path]) -> tuple[list[dict], list[str]]:
    """Facts of every host, and what is wrong, each sentence with the host's name (empty: nothing).

    Parameters
    ----------
    need_bytes : int
        Free disk that the checkpoints take; 0: not known.
    inputs : list of Path
        Files and folders that every host must have, with as many bytes as on the first.
    """
    marker = f".fastft-preflight-{uuid.uuid4().hex}"
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    (plan.run_dir / marker).touch()
    probes = [Probe(plan, host) for host in plan.hosts]
    try:
        found = _all(
            probes,
            do="facts",
            run_dir=str(plan.run_dir),
            port=plan.master_port or 29500,
            marker=marker,
            inputs=[str(path) for path in inputs],
        )
        for probe, facts in zip(probes, found, strict=True):
            facts["name"] = probe.host.name
            if "error" not in facts and (silent := NEEDED - facts.keys()):
                facts["error"] = f"its fastft is another one (it says nothing of {', '.join(sorted(silent))})"
            facts["skew"] = _skew(probe) if "error" not in facts else None
        _bandwidths(probes, found)
    finally:
        (plan.run_dir / marker).unlink()
        for probe in probes:
            probe.close()
    return found, problems(found, need_bytes, plan)


def _json(line: str) -> object:
    """None when it is not JSON."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _all(probes: list[Probe], **order) -> list[dict]:
    """Every host's answer to the same question, asked at once."""
    answers: list[dict] = [{}] * len(probes)

    def ask(i: int) -> None:
        answers[i] = probes[i].ask(**order)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(probes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def _skew(probe: Probe) -> float | None:
    """Seconds that its clock is ahead of ours, of the quickest
    of three answers (NTP's rule: the middle of the round trip).
    """
    best = None
    for _ in range(3):
        start = time.time()
        answer = probe.ask(do="clock")
        end = time.time()
        if "clock" in answer and (best is None or end - start < best[0]):
            best = end - start, answer["clock"] - (start + end) / 2
    return best[1] if best else None


def _bandwidths(probes: list[Probe], found: list[dict]) -> None:
    """From every host to the next, one after the other; the last sends to the first.

    What looks slow is measured again: hosts may be busy for a moment.
    """
    good = [i for i, facts in enumerate(found) if "error" not in facts]
    if len(good) < 2:
        return
    pairs = dict(zip(good, good[1:] + good[:1], strict=True))
    for sender, receiver in pairs.items():
        found[sender]["to"] = probes[receiver].host.name
        found[sender]["bandwidth"] = _bandwidth(probes[sender], probes[receiver])
    for _ in range(AGAIN):
        for sender in [i for i in good if _is_slow(found[i], found)]:
            found[sender]["bandwidth"] = max(
                found[sender]["bandwidth"], _bandwidth(probes[sender], probes[pairs[sender]]) or 0.0
            )


def _bandwidth(sender: Probe, receiver: Probe) -> float | None:
    """Bytes per second; None when nothing comes through."""
    port = receiver.ask(do="serve").get("port")
    sent: dict = {}
    thread = threading.Thread(
        target=lambda: sent.update(
            sender.ask(do="send", address=address(receiver.host.name), port=port, seconds=SENDING)
        )
    )
    thread.start()
    answer = receiver.ask(do="receive")
    thread.join()
    return answer.get("bytes_per_second") if "error" not in sent else None


def _is_slow(facts: dict, found: list[dict]) -> bool:
    speeds = [f["bandwidth"] for f in found if f.get("bandwidth")]
    return bool(facts.get("bandwidth")) and facts["bandwidth"] < MIN_BANDWIDTH * statistics.median(speeds)


def problems(found: list[dict], need_bytes: int, plan: Plan) -> list[str]:
    """What is wrong with these facts, a sentence each."""
    wrong = [f"{f['name']}: cannot be asked: {f['error']}" for f in found if "error" in f]
    good = [f for f in found if "error" not in f]
    speeds = [f["bandwidth"] for f in good if f.get("bandwidth")]
    for f in good:
        name, first = f["name"], good[0]
        wrong += [
            f"{name}: {key} {f[key]}, {first['name']} has {first[key]}"
            for key in ("python", "code", "gpus")
            if f[key] != first[key]
        ]
        wrong += [f"{name}: {package} {v}" for package, v in f["packages"].items() if v and UNUSABLE in v]
        wrong += [
            f"{name}: {package} {f['packages'].get(package)}, {first['name']} has {version}"
            for package, version in first["packages"].items()
            if f["packages"].get(package) != version and UNUSABLE not in f"{f['packages'].get(package)} {version}"
        ]
        for path, size in f["inputs"].items():
            if size is None:
                wrong.append(f"{name}: {path} is not there, or cannot be read")
            elif size == 0:
                wrong.append(f"{name}: {path} is empty")
            elif first["inputs"][path] not in (None, size):
                wrong.append(f"{name}: {path} has {size:,} bytes, on {first['name']} {first['inputs'][path]:,}")
        if f["skew"] is not None and abs(f["skew"]) > MAX_SKEW:
            wrong.append(f"{name}: its clock is {f['skew']:+.1f} s off")
        if f["disk_error"]:
            wrong.append(f"{name}: {f['disk_error']}")
        elif not f["shared"]:
            wrong.append(f"{name}: sees another {plan.run_dir}: run.dir must be on a disk that all hosts share")
        elif need_bytes and f["disk_free"] < need_bytes:
            wrong.append(
                f"{name}: {f['disk_free'] / 1e9:.1f} GB free in {plan.run_dir}, "
                f"the checkpoints need {need_bytes / 1e9:.1f} GB"
            )
        if f["gpus"] and (f["shm"] or 0) < MIN_SHM:
            wrong.append(f"{name}: /dev/shm has {(f['shm'] or 0) / 1e9:.2f} GB free, NCCL wants {MIN_SHM / 1e9:.0f} GB")
        if "to" in f and not f["bandwidth"]:
            wrong.append(f"{name}: cannot send to {f['to']}")
        elif _is_slow(f, good):
            wrong.append(
                f"{name}: {f['bandwidth'] / 1e6:,.0f} MB/s to {f['to']}, "
                f"the median is {statistics.median(speeds) / 1e6:,.0f}"
            )
        slots = next(h.slots for h in plan.hosts if h.name == name)
        if f["gpus"] and slots > len(f["gpus"]):
            wrong.append(f"{name}: {slots} slots for {len(f['gpus'])} GPUs")
    if good and not good[0]["port_free"]:
        wrong.append(f"{good[0]['name']}: port {plan.master_port or 29500} is taken")
    return wrong


def checkpoint_bytes(model: Path, dtype: str, keep: int) -> int:
    """About what ``keep`` checkpoints of a local model and the one being written take:
    weights, fp32 master and moments. 0 where its files do not say.
    """
    files = list(model.glob("*.safetensors")) if model.is_dir() else []
    stored = sum(f.stat().st_size for f in files)
    per = {"fp32": 4, "bf16": 2}[dtype]
    return (keep + 1) * int(stored / per * (per + 12)) if stored else 0


def describe(found: list[dict]) -> list[list[str]]:
    """Rows of a table: host, python, torch, code, GPUs, disk free, disk write, bandwidth, clock."""
    rows = []
    for f in found:
        if "error" in f:
            rows.append([f["name"], "-", "-", "-", "-", "-", "-", "-", f["error"]])
            continue
        rate = f"{f['bandwidth'] / 1e6:,.0f} MB/s to {f['to']}" if f.get("bandwidth") else "-"
        disk = (
            ("-", "-") if f["disk_error"] else (f"{f['disk_free'] / 1e9:,.0f} GB", f"{f['disk_write'] / 1e6:,.0f} MB/s")
        )
        rows.append(
            [
                f["name"],
                f["python"],
                str(f["packages"]["torch"]),
                f["code"],
                str(len(f["gpus"])),
                *disk,
                rate,
                f"{f['skew']:+.3f} s" if f["skew"] is not None else "-",
            ]
        )
    return rows


COLUMNS = ("host", "python", "torch", "code", "GPUs", "disk free", "disk write", "bandwidth", "clock")
