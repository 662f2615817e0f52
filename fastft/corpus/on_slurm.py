"""`executor: slurm`: an array job of Slurm whose tasks connect to the process that reads and writes, prove that they
have the key that it wrote for them, and clean and tokenize.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, NoReturn

from fastft.config.corpus import Slurm
from fastft.corpus.pool import AGAIN, python_path, serve
from fastft.errors import UserError
from fastft.files import remove
from fastft.processes import Member, Piped

log = logging.getLogger(__name__)

POLL = 5.0  # seconds between two questions for the jobs' state
SAID = 30.0  # seconds between two lines of the log while none has started
PATIENCE = 30  # seconds in which who connects has to prove its key
ENDED = 15.0  # seconds that Slurm is given to say how a job has ended, and to end them
KEY, JOB = "key", "job"  # files of the jobs' folder
SHOWN = 10  # lines of a log


class Jobs:
    """Tasks of one array job. One that has ended is an error: it names the job and its log.

    Parameters
    ----------
    folder : Path
        For the key, and for the logs: they stay when something fails.
    """

    def __init__(self, settings: Slurm, workers: int, setup: tuple[Any, ...], folder: Path):
        for tool in ("sbatch", "squeue", "scontrol", "scancel"):
            if not shutil.which(tool):
                raise UserError(f"executor: slurm: there is no {tool} here.", "Start it where Slurm's commands are.")
        self.settings, self.count, self.setup, self.folder = settings, workers, setup, folder.absolute()
        _end_former(self.folder)
        self.folder.mkdir(mode=0o700)
        self.key = secrets.token_bytes(32)
        self.server = socket.create_server(("", 0), backlog=workers)
        self.changed = threading.Condition()
        self.found: dict[int, Connection] = {}  # by the accepting thread
        self.jobs: dict[int, _Job] = {}
        self.began = self.said = time.monotonic()
        self.looked, self.id, self.closed = 0.0, "", False
        try:
            self._write_key()
            threading.Thread(target=self._accept, daemon=True).start()
            self.id = self._submit()
        except BaseException:
            self.close()
            raise

    def members(self) -> Sequence[Member]:
        while True:
            with self.changed:
                if not self.found:
                    self.changed.wait(0 if self.jobs else POLL / 5)
                found, self.found = self.found, {}
            for number, pipe in found.items():
                self.jobs[number] = job = _Job(self, number, pipe)
                job.send(self.setup)
            if len(self.jobs) < self.count:
                self.look()
            if self.jobs:
                return list(self.jobs.values())

    def look(self) -> None:
        """Ask Slurm, at most every ``POLL`` seconds. UserError when a job is no more."""
        if time.monotonic() - self.looked < POLL:
            return
        states = self._states()
        self.looked = time.monotonic()
        if states is None:
            return
        with self.changed:
            begun = {*self.found, *self.jobs}
        for number in range(self.count):
            if number not in states:
                self.died(number, "" if number in begun else " before it could begin")
        if not begun:
            said = ", ".join(sorted(set(states.values())))
            waited = time.monotonic() - self.began
            if waited > self.settings.wait:
                raise UserError(
                    f"executor: slurm: none of the tasks of job {self.id} has begun in {waited:.0f} s: {said}.",
                    "Look at partition, options and the queue (squeue), or raise executor.slurm.wait.",
                )
            if time.monotonic() - self.said > SAID:
                self.said = time.monotonic()
                log.info("waiting for Slurm: job %s is %s", self.id, said)

    def died(self, number: int, when: str = "") -> NoReturn:
        """Name the job, how it ended, and its log."""
        job, path = f"{self.id}_{number}", self.folder / f"{self.id}_{number}.log"
        end = time.monotonic() + ENDED
        while (state := self._ended(job)) is None and time.monotonic() < end:
            time.sleep(0.5)
        lines = path.read_text(errors="replace").splitlines()[-SHOWN:] if path.is_file() else []
        said = "\n".join([f"Its log, {path}, ends with:", *lines]) if lines else f"Its log, {path}, says nothing."
        raise UserError(
            f"executor: slurm: job {job} ended{when}: {state or 'Slurm does not say how'}. {said}",
            f"Where memory is short: executor.slurm.options: [--mem=8G], or a lower max_document_bytes. {AGAIN}",
        )

    def close(self) -> None:
        """Close the connections, at which a process ends; and cancel what is left."""
        with self.changed:
            self.closed = True
            pipes = [*self.found.values(), *(job.pipe for job in self.jobs.values())]
        for pipe in pipes:
            pipe.close()
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)  # the thread that accepts ends
        self.server.close()
        remove(self.folder / KEY)
        if self.id:
            _cancel(self.id)
            end = time.monotonic() + ENDED
            while self._states() and time.monotonic() < end:
                time.sleep(0.2)
            remove(self.folder / JOB)

    def _write_key(self) -> None:
        host = self.settings.host or socket.gethostname()
        told = {"host": host, "port": self.server.getsockname()[1], "key": self.key.hex()}
        with open(os.open(self.folder / KEY, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as f:
            json.dump(told, f)

    def _submit(self) -> str:
        settings = self.settings
        code = "import sys; from fastft.corpus.on_slurm import work; work(sys.argv[1])"
        run = shlex.join([sys.executable, "-c", code, str(self.folder / KEY)])
        script = f"#!/bin/sh\nexport PYTHONPATH={shlex.quote(python_path())}\nexec {run}\n"
        log_of = str(self.folder).replace("%", "%%")
        command = ["sbatch", "--parsable", "--job-name=fastft-prepare", f"--array=0-{self.count - 1}", "--ntasks=1"]
        command += ["--no-requeue", f"--output={log_of}/%A_%a.log", "--export=ALL"]
        command += [f"--partition={settings.partition}"] if settings.partition else []
        command += [f"--time={settings.time}"] if settings.time else []
        done = _asked([*command, *settings.options], script)
        if done.returncode:
            raise UserError(
                f"executor: slurm: sbatch refused the jobs: {done.stderr.strip()}",
                "Look at executor.slurm: partition, time and options.",
            )
        job = done.stdout.strip().split(";")[0]
        (self.folder / JOB).write_text(job)
        log.info("Slurm job %s: %d tasks, logs in %s", job, self.count, self.folder)
        return job

    def _accept(self) -> None:
        while True:
            try:
                sock, where = self.server.accept()
            except OSError:
                return
            try:
                number, pipe = self._greet(sock)
            except Exception as e:  # whoever it is
                log.warning("a connection from %s is none of Slurm's jobs: %s", where[0], e or type(e).__name__)
                continue
            with self.changed:
                if self.closed or number in self.found or number in self.jobs:
                    pipe.close()
                else:
                    self.found[number] = pipe
                    self.changed.notify()

    def _greet(self, sock: socket.socket) -> tuple[int, Connection]:
        """Number and connection of a task that has the key. Nothing is unpickled before that."""
        other = sock.dup()
        pipe = Connection(sock.detach())
        try:
            with other:
                other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", PATIENCE, 0))
                deliver_challenge(pipe, self.key)
                answer_challenge(pipe, self.key)
                number = int(pipe.recv_bytes(16))
                if not 0 <= number < self.count:
                    raise ValueError(f"no task has number {number}")
                other.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
                other.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        except BaseException:
            pipe.close()
            raise
        return number, pipe

    def _states(self) -> dict[int, str] | None:
        """Number of a task that waits or runs -> in words; None where Slurm does not say."""
        done = _asked(["squeue", "--noheader", "--array", f"--jobs={self.id}", "--format=%K|%T (%r)"])
        if done.returncode:
            return {} if "Invalid job id" in done.stderr else None
        lines = (line.strip().partition("|") for line in done.stdout.splitlines())
        return {int(number): state for number, _, state in lines if number.isdigit()}

    @staticmethod
    def _ended(job: str) -> str | None:
        """How a job has ended, in Slurm's words; None as long as it has not."""
        told = dict(pair.partition("=")[::2] for pair in _asked(["scontrol", "show", "job", job]).stdout.split())
        state = told.get("JobState", "PENDING")
        if state in ("PENDING", "RUNNING", "COMPLETING", "SUSPENDED", "CONFIGURING"):
            return None
        return f"{state} (exit code {told.get('ExitCode')}, reason {told.get('Reason')}, node {told.get('NodeList')})"


class _Job(Piped):
    """A member: a task of the array job."""

    def __init__(self, pool: Jobs, number: int, pipe: Connection):
        self.pool, self.number, self.pipe = pool, number, pipe

    def result(self) -> Any:
        while not self.pipe.poll(POLL):
            self.pool.look()  # its node may be gone without a word
        return super().result()

    def died(self) -> NoReturn:
        self.pool.died(self.number)


def work(path: str) -> None:
    """A task of the job: connect, and work on blocks until the first process is gone."""
    try:
        told = json.loads(Path(path).read_text())
    except FileNotFoundError:
        sys.exit(f"{path}: is not there: fastft prepare has ended, or this node does not see its output's folder.")
    key, where = bytes.fromhex(told["key"]), (told["host"], told["port"])
    try:
        sock = socket.create_connection(where, PATIENCE)
    except OSError as e:
        sys.exit(f"{where[0]}:{where[1]}: cannot be reached from {socket.gethostname()}: {e}. See executor.slurm.host.")
    sock.settimeout(None)
    fd = sock.detach()
    pipe = Connection(os.dup(fd))
    answer_challenge(pipe, key)
    deliver_challenge(pipe, key)
    pipe.send_bytes(os.environ["SLURM_ARRAY_TASK_ID"].encode())
    pipe.close()
    serve(fd)


def _asked(command: list[str], said: str = "") -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, input=said, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"{command[0]} does not answer")


def _cancel(job: str) -> None:
    """The name keeps another job from being meant that has got the number since."""
    done = _asked(["scancel", "--name=fastft-prepare", job])
    if done.returncode and "Invalid job id" not in done.stderr:
        log.warning("Slurm job %s may be left: %s", job, done.stderr.strip())


def _end_former(folder: Path) -> None:
    """Cancel jobs of a run that was killed, and take their files away."""
    with suppress(OSError):
        _cancel((folder / JOB).read_text())
    remove(folder)
