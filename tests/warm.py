"""Processes that start with torch, transformers, DeepSpeed and fastft imported already: forked from one that did
nothing else.

Importing takes three seconds, three quarters of what most tests of the command line need. What runs is
`python -m fastft ARGUMENTS` or a script all the same: in a process and a session of its own, with its own environment,
working directory and standard streams, left by the same exit. What such a process starts with subprocess is forked,
too, where it is fastft again: a launcher's agents, and their ranks. Those are real children of who started them, under
the command line that they would have, so that signals, exit codes and /proc are the real ones.

Whatever is read when a module is imported is read once, so what has a PYTHONPATH of its own is a new interpreter, and
a test that sets a variable that an import reads starts one (launch.start). The seed of Python's hashes is the same in
all, so what may depend on the order of a set is tested cold, too (FASTFT_TEST_COLD=1: everything is a new interpreter).
"""

import atexit
import ctypes
import gc
import inspect
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
import warnings
from contextlib import suppress
from pathlib import Path

POLL = 0.01  # seconds
ROOM = 4096  # bytes for the command line that /proc shows


class Warm:
    """A forked process, with the part of subprocess.Popen that tests use.

    pipe: its output is read from ``stdout``, while it runs. terminal: it goes to this one.
    """

    def __init__(self, arguments: list, env: dict[str, str], pipe: bool = False, terminal: str | None = None):
        self.args, self.returncode = [str(a) for a in arguments], None
        if terminal:
            self.pid = _server().start({"argv": self.args, "env": env, "cwd": os.getcwd(), "output": terminal})
            return
        handle, name = tempfile.mkstemp(dir=_server().folder.name)
        os.close(handle)
        self.output = Path(name)
        if pipe:
            self.output.unlink()
            os.mkfifo(self.output)
        self.pid = _server().start({"argv": self.args, "env": env, "cwd": os.getcwd(), "output": str(self.output)})
        if pipe:
            self.stdout = open(self.output, errors="replace")  # noqa: SIM115 - waits until the process has opened it, too
            self.output.unlink()

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = _server().code(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(POLL)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):  # it ends between the two
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
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
            [sys.executable, __file__, str(theirs.fileno()), " " * ROOM],
            pass_fds=[theirs.fileno()],
            start_new_session=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "PYTHONPATH": os.environ["PYTHONPATH"],
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
    import deepspeed
    import setuptools  # noqa: F401
    import transformers.models.auto.modeling_auto
    import transformers.models.bert.modeling_bert
    import transformers.models.llama.modeling_llama  # noqa: F401

    with suppress(ImportError):  # what DeepSpeed imports when an engine is built, and torch's whole compiler with it
        import deepspeed.runtime.zero.muon.muon_optimizer
        import deepspeed.runtime.zero.stage3
        import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401
    with suppress(ImportError):  # made at the first model that is loaded, from a thousand regular expressions
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping

        get_checkpoint_conversion_mapping("llama")
    import fastft.cli
    import fastft.tasks.causal_lm
    import fastft.tasks.classification
    import fastft.train.loop  # noqa: F401

    gc.collect()
    gc.freeze()  # the collector would touch, and so copy, every page in every child
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
    os.setsid()
    streams = os.open(order["output"], os.O_WRONLY | os.O_APPEND), os.open(os.devnull, os.O_RDONLY)
    become(order["argv"], order["env"], order["cwd"], (streams[1], streams[0], streams[0]))


class Forking(subprocess.Popen):
    """subprocess.Popen in a forked process: forks again where the command is fastft, too."""

    signature = inspect.signature(subprocess.Popen._execute_child)
    path = os.environ.get("PYTHONPATH")

    def _execute_child(self, *given):
        order = self.signature.bind(self, *given).arguments
        args, env = order["args"], order["env"] or os.environ
        if not (
            isinstance(args, list)
            and [str(a) for a in args[:2]] == [sys.executable, "-m"]
            and args[2].split(".")[0] == "fastft"
            and env.get("PYTHONPATH") == self.path
            and env.get("FASTFT_TEST_COLD") != "1"
        ):
            super()._execute_child(*given)
            return
        self.pid = os.fork()
        if self.pid == 0:
            if order["start_new_session"]:
                os.setsid()
            streams = order["p2cread"], order["c2pwrite"], order["errwrite"]
            become([str(a) for a in args[1:]], dict(env), order["cwd"] or os.getcwd(), streams)
        self._child_created = True
        self._close_pipe_fds(
            *(order[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"))
        )


def become(argv: list[str], env: dict[str, str], cwd: str, streams: tuple[int, int, int]) -> None:
    """What `python ARGV` is after its imports. streams: standard input, output and error; -1: the one that is there."""
    code = 1
    try:
        _renew(argv, env, cwd, streams)
        code = _execute(argv)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _renew(argv: list[str], env: dict[str, str], cwd: str, streams: tuple[int, int, int]) -> None:
    """Of what exec does away with: open files, handlers of signals, environment, random numbers."""
    import random

    import numpy as np
    import torch

    for target, stream in enumerate(streams):
        if stream not in (-1, target):
            os.dup2(stream, target)
    nothing = os.open(os.devnull, os.O_RDWR)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != nothing and os.path.exists(f"/proc/self/fd/{name}"):
            os.dup2(nothing, int(name), inheritable=False)  # not closed: its number may still be somebody's to close
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    unbuffered = bool(env.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", buffering=1 if unbuffered else -1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    _show([sys.executable, *argv])
    random.seed()
    np.random.seed()
    torch.seed()
    subprocess.Popen = Forking


def _show(command: list[str]) -> None:
    """The command line in /proc, which a process may write over (proc(5): arg_start, arg_end)."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    text = b"".join(os.fsencode(word) + b"\0" for word in command)[: end - start - 1]
    ctypes.memmove(start, text.ljust(end - start, b"\0"), end - start)


def _execute(argv: list[str]) -> int:
    import runpy
    import traceback

    code = 0
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* found in sys.modules after import of package", RuntimeWarning)
            if argv[0] == "-m":
                sys.argv = argv[1:]
                runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = argv
                sys.path[0] = str(Path(argv[0]).parent)
                runpy.run_path(argv[0], run_name="__main__")
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
    return code


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
