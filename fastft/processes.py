"""Processes that work on pieces of what this one reads. Results come in the order of the pieces, whoever is done first.
A process whose parent dies ends, too.
"""

from __future__ import annotations

import gc
import os
import pickle
import queue
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol, TypeVar

from fastft.errors import UserError

HELD = 2  # pieces that a member has: one in work, one behind it
Work = Callable[[Any], Any]
T = TypeVar("T")


class Member(Protocol):
    """One that works on pieces, in the order in which they are sent."""

    def send(self, work: Any) -> None: ...

    def result(self) -> Any:
        """Of the first piece that has been sent and not given back; raises what the work raised."""


class Pool(Protocol):
    def members(self) -> Sequence[Member]:
        """Those that work by now: one at least, waited for; more can come."""

    def close(self) -> None:
        """End them all."""


def in_order(pieces: Iterable[T], pool: Pool, sent: Callable[[T], Any]) -> Iterator[tuple[T, Any]]:
    """(piece, result) for each piece. ``sent``: what of a piece goes to a member."""
    waiting: deque[tuple[T, Member]] = deque()
    held: Counter[Member] = Counter()
    for piece in pieces:
        while held[member := min(pool.members(), key=held.__getitem__)] == HELD:
            first, by = waiting.popleft()
            held[by] -= 1
            yield first, by.result()
        member.send(sent(piece))
        held[member] += 1
        waiting.append((piece, member))
    while waiting:
        first, by = waiting.popleft()
        yield first, by.result()


class Piped:
    """A member behind a connection.

    Attributes
    ----------
    pipe : Connection
    """

    pipe: Connection

    def send(self, work: Any) -> None:
        try:
            self.pipe.send_bytes(pickle.dumps(work, protocol=5))
        except OSError:
            self.died()

    def result(self) -> Any:
        try:
            found = self.pipe.recv_bytes()
        except (EOFError, OSError):
            self.died()
        return opened(found)

    def died(self) -> NoReturn:
        raise NotImplementedError


def how_it_ended(code: int) -> str:
    """``code``: as subprocess has it."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"


class Copies:
    """Copies of this process as it is now: what the work needs is there already, and need not pickle.

    Parameters
    ----------
    work : callable
        Is given each piece; must not change what later pieces depend on.
    count : int
        The most of them: one is made for each piece until they are there.
    advice : str
        What to do where one is killed.
    """

    def __init__(self, work: Work, count: int, advice: str):
        self.work, self.count, self.advice = work, count, advice
        self.copies = list[_Copy]()

    def members(self) -> Sequence[Member]:
        if len(self.copies) < self.count:
            self.copies.append(_Copy(self.work, self.advice))
        return self.copies

    def close(self) -> None:
        for copy in self.copies:
            copy.pipe.close()
        for copy in self.copies:
            copy.end()


class _Copy(Piped):
    def __init__(self, work: Work, advice: str):
        ours, theirs = socket.socketpair()
        self.advice = advice
        self.pid = os.fork()
        if not self.pid:
            try:
                ours.close()  # so that it notices when the parent is gone
                signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                    signal.signal(number, signal.SIG_DFL)
                os.environ["TOKENIZERS_PARALLELISM"] = "false"
                Serving(theirs.detach()).work(work)
            finally:
                os._exit(1)
        theirs.close()
        self.pipe = Connection(ours.detach())

    def died(self) -> NoReturn:
        code = _waited(self.pid, 0)
        self.pid = 0
        ended = "ended" if code is None else how_it_ended(os.waitstatus_to_exitcode(code))
        raise UserError(f"A process that prepares data {ended}.", self.advice)

    def end(self) -> None:
        """Behind the end of its connection it ends by itself; one that is stopped is killed."""
        deadline = time.monotonic() + 5
        while self.pid and _waited(self.pid, os.WNOHANG) == RUNS:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                _waited(self.pid, 0)
                break
            time.sleep(0.002)
        self.pid = 0


RUNS = -1


def _waited(pid: int, how: int) -> int | None:
    """A child's status, or RUNS; None: it ended, and nobody knows how, for SIGCHLD is ignored."""
    try:
        found, status = os.waitpid(pid, how)
    except ChildProcessError:
        return None
    return status if found else RUNS


class Serving:
    """The other end of a connection: what came, and what is to be sent, until the other end is gone. Then this process
    is over: nobody waits for what it has in work.
    """

    def __init__(self, fd: int):
        pipe = Connection(fd)
        # Sending never waits for us, nor we for who reads our answers in their order: at most HELD are under way.
        self._came: queue.Queue[bytes] = queue.Queue()
        self._answers: queue.Queue[bytes] = queue.Queue()
        for move in (lambda: self._came.put(pipe.recv_bytes()), lambda: pipe.send_bytes(self._answers.get())):
            threading.Thread(target=_until_gone, args=(move,), daemon=True).start()

    def take(self) -> Any:
        return pickle.loads(self._came.get())

    def work(self, work: Work) -> NoReturn:
        gc.freeze()  # what is made for a piece is in no cycle, and there is much of it
        gc.set_threshold(100_000, 20, 20)
        while True:
            self._answers.put(answer(work, self.take()))


def _until_gone(move: Callable[[], None]) -> None:
    while True:
        try:
            move()
        except (EOFError, OSError):
            os._exit(0)


def answer(work: Work, piece: Any) -> bytes:
    """The pickled result, or exception."""
    try:
        result = work(piece)
    except Exception as e:
        result = _portable(e)
    return pickle.dumps(result, protocol=5)


def opened(answer: bytes) -> Any:
    """The result of an answer; raises the exception that it is."""
    found = pickle.loads(answer)
    if isinstance(found, BaseException):
        raise found
    return found


def _portable(error: Exception) -> Exception:
    """An exception that pickles, with what it says."""
    try:
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    except Exception:
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
