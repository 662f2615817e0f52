"""Processes that start with torch, transformers, DeepSpeed and fastft imported already:
forked from one that did nothing else.

Importing takes three seconds, three quarters of what most tests of the command line need. What runs is `python -m
fastft ARGUMENTS` or a script all the same: in a process and a session of its own, with its own environment, working
directory and standard streams, left by the same exit. Whatever is read when a module is imported is read once, so a
test that sets such a variable starts a real process (launch.start), as all tests of launchers do. The seed of Python's
hashes is the same in all, so what may depend on the order of a set is tested cold, too (launch.ranks,
FASTFT_TEST_COLD=1).
"""

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

POLL = 0.01  # seconds


class Warm:
    """A forked process, with the part of subprocess.Popen that launch.finish and launch.kill_group use."""

    def __init__(self, arguments: list, env: dict[str, str]):
        self.args, self.returncode = [str(a) for a in arguments], None
        handle, name = tempfile.mkstemp(dir=_server().folder.name)
        os.close(handle)
        self.output = Path(name)
        self.pid = _server().start({"argv": self.args, "env": env, "cwd": os.getcwd(), "output": str(self.output)})

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := _server().code(self.pid)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL)
        self.returncode = code
        self._leaves_nothing()
        text = self.output.read_text(errors="replace")
        self.output.unlink()
        return text, None

    def _leaves_nothing(self) -> None:
        """A pipe would stay open for as long as a process that it has started lives on."""
        deadline = time.monotonic() + 5
        while True:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return
            if time.monotonic() > deadline:
                os.killpg(self.pid, signal.SIGKILL)
                raise AssertionError(f"{self.args} left processes behind")
            time.sleep(POLL)


class _Server:
    """The client's end: one process per test session, which ends with it."""

    def __init__(self):
        self.folder = tempfile.TemporaryDirectory(prefix="fastft-warm-")
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": str(Path(__file__).parent.parent),
            },
        )
        theirs.close()
        self.socket, self.buffer, self.codes = ours, b"", {}
        self.started: list[int] = []

    def start(self, order: dict) -> int:
        self.socket.sendall((json.dumps(order) + "\n").encode())
        while not self.started:
            self._read(wait=True)
        return self.started.pop()

    def code(self, pid: int) -> int | None:
        """Exit code as subprocess has it; None: it runs."""
        self._read(wait=False)
        return self.codes.pop(pid, None)

    def _read(self, wait: bool) -> None:
        while select.select([self.socket], [], [], 60 if wait else 0)[0]:
            received = self.socket.recv(1 << 16)
            if not received:
                raise RuntimeError(f"tests/warm.py ended with {self.process.wait()}")
            *lines, self.buffer = (self.buffer + received).split(b"\n")
            for answer in map(json.loads, lines):
                if "started" in answer:
                    self.started.append(answer["started"])
                else:
                    self.codes[answer["pid"]] = answer["code"]
            wait = False


_servers: list[_Server] = []


def _server() -> _Server:
    if not _servers:
        _servers.append(_Server())
    return _servers[0]


def serve(connection: socket.socket) -> None:
    import deepspeed  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fastft.tasks.causal_lm
    import fastft.tasks.classification
    import fastft.train.loop  # noqa: F401

    buffer = b""
    while True:
        if select.select([connection], [], [], POLL)[0]:
            received = connection.recv(1 << 16)
            if not received:
                return
            buffer += received
        while b"\n" in buffer:
            line, _, buffer = buffer.partition(b"\n")
            pid = os.fork()
            if pid == 0:
                connection.close()
                run(json.loads(line))
            connection.sendall((json.dumps({"started": pid}) + "\n").encode())
        try:
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                connection.sendall(
                    (json.dumps({"pid": ended[0], "code": os.waitstatus_to_exitcode(ended[1])}) + "\n").encode()
                )
        except ChildProcessError:
            pass


def run(order: dict) -> None:
    """The process that was asked for; never returns."""
    import random
    import runpy
    import traceback

    import numpy as np
    import torch

    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    streams = os.open(order["output"], os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    for target, stream in ((1, streams[0]), (2, streams[0]), (0, streams[1])):
        os.dup2(stream, target)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    random.seed()
    np.random.seed()
    torch.seed()
    code = 0
    try:
        if order["argv"][:2] == ["-m", "fastft"]:
            sys.argv = ["fastft", *order["argv"][2:]]
            runpy.run_module("fastft", run_name="__main__", alter_sys=False)
        else:
            sys.argv = order["argv"]
            sys.path[0] = str(Path(sys.argv[0]).parent)
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
