"""What one host says of itself to `fastft preflight`: ``python -m fastft.launch.probe``,
orders on standard input, answers on standard output, JSON lines.
"""

import hashlib
import importlib
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from contextlib import redirect_stdout
from importlib import metadata
from pathlib import Path

from fastft.launch.hostfile import port_free

PACKAGES = ("torch", "deepspeed", "transformers", "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
IMPORTED = ("torch", "deepspeed", "transformers")  # metadata alone would not see that the files are gone
BLOCK = 1 << 20


def facts(run_dir: str, port: int, marker: str, inputs: list[str]) -> dict:
    """Versions, code, clock, disk, shared memory, GPUs, the size of every input,
    and whether the run's folder is the one that the first host sees.
    """
    return {
        "host": socket.gethostname(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "code": code_hash(),
        "clock": time.time(),
        "cpus": len(os.sched_getaffinity(0)),
        "gpus": _gpus(),
        "shm": _free("/dev/shm"),
        "port_free": port_free("0.0.0.0", port),
        "inputs": {path: _size(Path(path)) for path in inputs},
        **_disk(Path(run_dir), marker),
    }


def code_hash() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _size(path: Path) -> int | None:
    """Bytes of a file, or of all files in a folder; None: not there, or something that cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    try:
        files = [path]
        if path.is_dir():
            files = [
                file
                for folder, _, names in os.walk(path, onerror=fail)
                for name in names
                if (file := Path(folder, name)).is_file()
            ]
        sizes = [file.stat().st_size for file in files]
    except OSError:
        return None
    return sum(sizes) if all(os.access(file, os.R_OK) for file in files) else None


def _version(package: str) -> str | None:
    """Of an installed package; why it cannot be imported, where its files are gone or broken."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
    if package in IMPORTED:
        try:
            with redirect_stdout(sys.stderr):  # some print as they are imported
                importlib.import_module(package)
        except Exception as e:  # whatever their code raises
            return f"{version}, which cannot be imported ({type(e).__name__}: {e})"
    return version


def _gpus() -> list[str]:
    """Name and driver of every GPU."""
    if not shutil.which("nvidia-smi"):
        return []
    query = subprocess.run(
        ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"], capture_output=True, text=True
    )
    return [line.strip() for line in query.stdout.splitlines()] if query.returncode == 0 else []


def _free(path: str) -> int | None:
    return shutil.disk_usage(path).free if Path(path).is_dir() else None


def _disk(run_dir: Path, marker: str) -> dict:
    """Free bytes, the speed of a write that reaches the disk, and whether the marker of the first host is there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe, data = run_dir / f".fastft-probe-{socket.gethostname()}-{os.getpid()}", os.urandom(16 * BLOCK)
        start = time.perf_counter()
        with open(probe, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        probe.unlink()
    except OSError as e:
        return {
            "disk_error": f"{e.filename or run_dir}: {e.strerror}",
            "disk_free": None,
            "disk_write": None,
            "shared": False,
        }
    return {
        "disk_error": None,
        "disk_free": _free(str(run_dir)),
        "disk_write": len(data) / seconds,
        "shared": (run_dir / marker).exists(),
    }


def serve() -> tuple[socket.socket, int]:
    listener = socket.socket()
    listener.bind(("0.0.0.0", 0))
    listener.listen(1)
    listener.settimeout(20)
    return listener, listener.getsockname()[1]


def receive(listener: socket.socket) -> float:
    """Bytes per second of what one peer sends."""
    with listener, listener.accept()[0] as peer:
        peer.settimeout(20)
        total, start = 0, time.perf_counter()
        while block := peer.recv(BLOCK):
            total += len(block)
        return total / max(time.perf_counter() - start, 1e-9)


def send(address: str, port: int, seconds: float) -> None:
    """Blocks for that long, one at least."""
    data = bytes(BLOCK)
    with socket.create_connection((address, port), timeout=10) as peer:
        end = time.perf_counter() + seconds
        peer.sendall(data)
        while time.perf_counter() < end:
            peer.sendall(data)


def main() -> None:
    listener: socket.socket | None = None
    for line in sys.stdin:
        order = json.loads(line)
        try:
            match order["do"]:
                case "facts":
                    answer = facts(order["run_dir"], order["port"], order["marker"], order["inputs"])
                case "clock":
                    answer = {"clock": time.time()}
                case "serve":
                    listener, port = serve()
                    answer = {"port": port}
                case "receive":
                    assert listener is not None  # "serve" was the order before
                    answer = {"bytes_per_second": receive(listener)}
                case "send":
                    send(order["address"], order["port"], order["seconds"])
                    answer = {}
        except OSError as e:
            answer = {"error": f"{order['do']}: {e.strerror or e}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
