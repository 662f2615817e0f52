"""Processes that work on blocks; results come in the order of the blocks. A process whose parent dies ends, too."""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from fastft.errors import UserError

HELD = 2  # blocks that a process has: one in work, one behind it


def in_order(blocks: Iterable[Any], workers: int, setup: tuple[Any, ...]) -> Iterator[tuple[Any, Any]]:
    """(block, result) for each block. With one worker the work is done here.

    Parameters
    ----------
    setup : tuple
        Arguments of ``work.Worker``.

    Raises
    ------
    UserError
        A process was killed; or what a rule raised in it.
    """
    if workers == 1:
        from fastft.corpus.work import Worker

        worker = Worker(*setup)
        for block in blocks:
            yield block, worker.run(block.rows)
        return
    pool = [_Process(setup) for _ in range(workers)]
    try:
        waiting: deque[tuple[Any, _Process]] = deque()
        for number, block in enumerate(blocks):
            process = pool[number % workers]
            if len(waiting) == HELD * workers:
                first, by = waiting.popleft()
                yield first, by.result()
            process.send(block.rows)
            waiting.append((block, process))
        while waiting:
            first, by = waiting.popleft()
            yield first, by.result()
    finally:
        for process in pool:
            process.end()


class _Process:
    def __init__(self, setup: tuple[Any, ...]):
        import socket

        ours, theirs = socket.socketpair()
        code = "import sys; from fastft.corpus.pool import serve; serve(int(sys.argv[1]))"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-c", code, str(theirs.fileno())]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self.pipe = Connection(ours.detach())
        self.send(setup)

    def send(self, work: Any) -> None:
        try:
            self.pipe.send_bytes(pickle.dumps(work, protocol=5))
        except OSError:
            self._died()

    def result(self) -> Any:
        try:
            found = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self._died()
        if isinstance(found, BaseException):
            raise found
        return found

    def _died(self) -> None:
        code = self.process.wait(10)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        raise UserError(
            f"A process that cleans and tokenizes {how}.",
            "Where memory is short, lower workers or max_document_bytes. Run again: what is done stays.",
        )

    def end(self) -> None:
        self.pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(fd: int) -> None:
    """A process of the pool: reads blocks until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's end is ours
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    pipe = Connection(fd)
    blocks: queue.Queue[Any] = queue.Queue()  # so that sending never waits for us: at most HELD are under way
    threading.Thread(target=_receive, args=(pipe, blocks), daemon=True).start()
    run = _ready(blocks)
    while (block := blocks.get()) is not None:
        try:
            result = run(block)
        except Exception as e:
            result = _portable(e)
        try:
            pipe.send_bytes(pickle.dumps(result, protocol=5))
        except OSError:
            break
    os._exit(0)  # past the thread, which may be waiting


def _receive(pipe: Connection, blocks: queue.Queue[Any]) -> None:
    while True:
        try:
            blocks.put(pickle.loads(pipe.recv_bytes()))
        except (EOFError, OSError):
            blocks.put(None)
            return


def _ready(blocks: queue.Queue[Any]) -> Callable[[Any], Any]:
    setup = blocks.get()
    if setup is None:
        os._exit(0)
    try:
        from fastft.corpus.work import Worker

        return Worker(*setup).run
    except Exception as e:
        problem = _portable(e)
        return lambda block: problem


def _portable(error: Exception) -> Exception:
    """An exception that pickles, with what it says."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
