"""Starting real ranks and commands with a time limit, and leaving nothing behind."""

import fcntl
import itertools
import os
import pty
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from pathlib import Path

import yaml
from warm import Warm

ROOT = Path(__file__).parent.parent
ENV = {
    **os.environ,
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}

TURNS = itertools.count()


def write_config(path: Path, config: dict) -> Path:
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def free_port() -> int:
    """A port that is free now, and that no other test process is given:
    outside the range that the kernel hands out, a stretch per process, each of its ports in turn.
    """
    stretch = 15_000 + 250 * (os.getpid() % 64)
    while True:
        port = stretch + next(TURNS) % 250
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def start(command: list[str], env: dict | None = None, **kwargs) -> subprocess.Popen:
    """A command in a session of its own, so that its whole process group can be ended."""
    return subprocess.Popen(
        [str(c) for c in command],
        env={**ENV, **(env or {})},
        start_new_session=True,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        **kwargs,
    )


def start_python(arguments: list, env: dict[str, str], pipe: bool = False) -> "subprocess.Popen | Warm":
    """`python ARGUMENTS` with variables that no import reads; cold where FASTFT_TEST_COLD=1 or PYTHONPATH is another.

    pipe: what it says is read while it runs, from ``stdout``.
    """
    env = {**ENV, **env}
    if os.environ.get("FASTFT_TEST_COLD") == "1" or arguments[0] == "-c" or env["PYTHONPATH"] != ENV["PYTHONPATH"]:
        return start([sys.executable, *arguments], env)
    return Warm(arguments, env, pipe)


def finish(process: "subprocess.Popen | Warm", timeout: float) -> str:
    """Wait, return the output; past the limit, kill the group and fail with what was printed."""
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise AssertionError(f"{process.args} ran past {timeout} s:\n{process.communicate()[0][-4000:]}") from None


def kill_group(process: "subprocess.Popen | Warm") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def fastft(*arguments, timeout: float = 180, env: dict | None = None, check: bool = True) -> tuple[int, str]:
    """Run the command line in a process of its own: (exit code, output)."""
    process = (
        start([sys.executable, "-m", "fastft", *arguments], env)
        if env
        else start_python(["-m", "fastft", *arguments], {})
    )
    output = finish(process, timeout)
    if check:
        assert process.returncode == 0, output[-4000:]
    return process.returncode, output


def on_terminal(width: int, *arguments, timeout: float = 180) -> tuple[int, str]:
    """Run the command line on a pseudo-terminal so many columns wide: (exit code, what was written to it)."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, width, 0, 0))
    env = {name: value for name, value in ENV.items() if name not in ("COLUMNS", "NO_COLOR", "CI")}
    process = Warm(["-m", "fastft", *arguments], {**env, "TERM": "xterm-256color"}, terminal=os.ttyname(theirs))
    written = []

    def read() -> None:
        with suppress(OSError):  # how Linux says that a terminal's last writer has gone
            while data := os.read(ours, 1 << 16):
                written.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        process.wait(timeout)
    finally:
        kill_group(process)
        os.close(theirs)
        reader.join()
        os.close(ours)
    return process.returncode, b"".join(written).decode(errors="replace").replace("\r\n", "\n")


def ranks(count: int, arguments: list, timeout: float = 240) -> list[str]:
    """Run ``python ARGUMENTS`` as ``count`` ranks of one process group; all must succeed."""
    port = str(free_port())
    processes = [
        start_python(
            arguments,
            {
                "RANK": str(r),
                "LOCAL_RANK": str(r),
                "WORLD_SIZE": str(count),
                "LOCAL_WORLD_SIZE": str(count),
                "LOCAL_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            },
        )
        for r in range(count)
    ]
    try:
        outputs = [finish(p, timeout) for p in processes]
    finally:
        for p in processes:
            kill_group(p)
    for p, output in zip(processes, outputs, strict=True):
        assert p.returncode == 0, output[-4000:]
    return outputs
