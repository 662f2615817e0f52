"""Who works on blocks: this process, others of this machine, a Ray cluster, jobs of Slurm."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from fastft import processes
from fastft.config.corpus import CorpusConfig
from fastft.corpus.lines import Lines
from fastft.errors import UserError
from fastft.processes import Member, Piped, Pool, Serving, Work, how_it_ended

EARLY = ("gigatoken", "awkward", "tokenizers")  # what most workers need, and takes half a second to import
AGAIN = "Run again: what is done stays."


def in_order(
    blocks: Iterable[Any], config: CorpusConfig, setup: Callable[[], tuple[Any, ...]], folder: Path
) -> Iterator[tuple[Any, Any]]:
    """(block, result) for each block. With one worker of this machine the work is done here.

    Parameters
    ----------
    setup : callable
        Gives the arguments of ``work.Worker``; processes of this machine start meanwhile.
    folder : Path
        Where an executor keeps its files: logs of jobs.

    Raises
    ------
    UserError
        A process was killed, a job ended, a cluster cannot be reached; or what a rule raised.
    """
    local = config.executor.ray is None and config.executor.slurm is None
    workers = config.workers or len(os.sched_getaffinity(0))
    if local and workers == 1:
        from fastft.corpus.work import Worker

        worker = Worker(*setup())
        for block in blocks:
            yield block, worker.run(block.rows)
        return
    with closing(_Local(workers, setup) if local else _remote(config, setup(), folder)) as pool:
        yield from processes.in_order(blocks, pool, lambda block: block.rows)


def _remote(config: CorpusConfig, setup: tuple[Any, ...], folder: Path) -> Pool:
    """Members on other machines: they compare their software with ours."""
    from fastft.corpus.work import software

    if config.executor.ray is not None:
        from fastft.corpus.on_ray import Actors

        return Actors(config.executor.ray, config.workers, (*setup, software(*setup)))
    from fastft.corpus.on_slurm import Jobs

    assert config.executor.slurm is not None and config.workers is not None
    return Jobs(config.executor.slurm, config.workers, (*setup, software(*setup)), folder)


class _Process(Piped):
    """One of this machine."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        code = "import sys; from fastft.corpus.pool import serve; serve(int(sys.argv[1]))"
        command = [sys.executable, "-c", code, str(theirs.fileno())]
        # Ctrl-C is the parent's; a process keeps the signals that are blocked when it is made.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], env={**os.environ, "PYTHONPATH": python_path()}
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.pipe = Connection(ours.detach())

    def send(self, work: Any) -> None:
        super().send(work.here() if isinstance(work, Lines) else work)

    def died(self) -> NoReturn:
        raise UserError(
            f"A process that cleans and tokenizes {how_it_ended(self.process.wait(10))}.",
            f"Where memory is short, lower workers or max_document_bytes. {AGAIN}",
        )

    def end(self) -> None:
        self.pipe.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class _Local:
    """Processes of this machine."""

    def __init__(self, workers: int, setup: Callable[[], tuple[Any, ...]]):
        self.processes = [_Process() for _ in range(workers)]
        try:
            ready = setup()
            for process in self.processes:
                process.send(ready)
        except BaseException:
            self.close()
            raise

    def members(self) -> Sequence[Member]:
        return self.processes

    def close(self) -> None:
        for process in self.processes:
            process.end()


def python_path() -> str:
    """PYTHONPATH of a process that finds what this one does."""
    return os.pathsep.join(path for path in sys.path if path)


def serve(fd: int) -> NoReturn:
    """A process of a pool: works on the blocks that come from a connection until the other end is gone."""
    serving = Serving(fd)
    for name in ("fastft.corpus.work", *EARLY):  # while whoever started this one gets ready
        with suppress(ImportError):
            import_module(name)
    serving.work(ready(serving.take()))


def ready(setup: tuple[Any, ...]) -> Work:
    """What works on blocks; where it cannot be made, what raises the reason at each. ``setup``: arguments of
    ``work.Worker``, and ``work.software`` where it must be the same.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from fastft.corpus.work import Worker, software

        *arguments, wanted = setup if len(setup) == 4 else (*setup, None)
        if wanted is not None and (here := software(*arguments)) != wanted:
            other = ", ".join(f"{n} {here.get(n)} instead of {v}" for n, v in wanted.items() if here.get(n) != v)
            raise UserError(
                f"executor: {os.uname().nodename} has other software: {other}.",
                "Install the same on every node: a corpus must not depend on who made which part of it.",
            )
        return Worker(*arguments).run
    except Exception as e:
        problem = e

        def raises(block: Any) -> NoReturn:
            raise problem

        return raises
