"""`executor: ray`: actors of a Ray cluster clean and tokenize."""

from __future__ import annotations

import logging
import os
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any

from fastft.config.corpus import Ray
from fastft.corpus.pool import AGAIN, ready
from fastft.errors import UserError
from fastft.processes import Member, answer, opened

log = logging.getLogger(__name__)

SAID = 60.0  # seconds without a result after which the log says so
CONNECT = 10.0  # seconds
LOST = 3  # actors that are replaced before the same block's result has come


class Worker:
    """What an actor is: it works in the folder that the first process works in, for paths can be relative."""

    def __init__(self, setup: tuple[Any, ...], folder: str):
        try:
            os.chdir(folder)
        except OSError as e:
            problem = UserError(f"executor: {e} on {os.uname().nodename}.", "Ray's nodes need the same folders.")
            self.work: Any = lambda block: _raise(problem)
        else:
            self.work = ready(setup)

    def run(self, block: Any) -> bytes:
        return answer(self.work, block)


def _raise(error: Exception) -> None:
    raise error


def _reach(address: str) -> None:
    """OSError where nothing listens: Ray itself takes minutes to say so."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()


class Actors:
    """Actors of a cluster, each with one core. A cluster that is started here ends with them."""

    def __init__(self, settings: Ray, workers: int | None, setup: tuple[Any, ...]):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            import ray
        except ImportError as e:
            raise UserError(f"executor: ray: {e}.", "pip install 'fastft[ray]'") from None
        self.ray = ray
        self.ours = not ray.is_initialized()
        if self.ours:
            where = settings.address or os.environ.get("RAY_ADDRESS", "")
            try:
                _reach(where)
                ray.init(settings.address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
            except (OSError, RuntimeError, ValueError) as e:
                raise UserError(
                    f"executor: ray: {where or 'a cluster on this machine'} cannot be used: {e}",
                    "Look whether it runs: ray status --address ADDRESS.",
                ) from None
        try:
            cores = int(ray.cluster_resources().get("CPU", 0))
            if cores < (workers or 1):
                raise UserError(f"workers: {workers or 1}: the Ray cluster has {cores} cores.", "Lower workers.")
            self.setup, self.folder = ray.put(setup), os.getcwd()
            self.actors = [_Actor(self) for _ in range(workers or cores)]
        except BaseException:
            self.close()
            raise

    def members(self) -> Sequence[Member]:
        return self.actors

    def start(self) -> Any:
        return self.ray.remote(num_cpus=1)(Worker).remote(self.setup, self.folder)

    def close(self) -> None:
        for actor in getattr(self, "actors", []):
            self.ray.kill(actor.actor)
        if self.ours:
            self.ray.shutdown()


class _Actor:
    """A member; when its actor is lost, another one does what had been sent."""

    def __init__(self, pool: Actors):
        self.pool, self.ray = pool, pool.ray
        self.actor = pool.start()
        self.sent: deque[tuple[Any, Any]] = deque()
        self.lost = 0

    def send(self, work: Any) -> None:
        self.sent.append((work, self.actor.run.remote(work)))

    def result(self) -> Any:
        while True:
            reference = self.sent[0][1]
            while not self.ray.wait([reference], timeout=SAID)[0]:
                log.info("executor: ray: no result for %.0f s; has the cluster room for the actors?", SAID)
            try:
                found = self.ray.get(reference)
            except (self.ray.exceptions.RayActorError, self.ray.exceptions.ObjectLostError) as e:
                self._replace(e)
            except self.ray.exceptions.RayError as e:
                raise UserError(f"executor: ray: {e}", AGAIN) from None
            else:
                self.sent.popleft()
                self.lost = 0
                return opened(found)

    def _replace(self, why: Exception) -> None:
        self.lost += 1
        first = str(why).strip().splitlines()[0] if str(why).strip() else type(why).__name__
        if self.lost > LOST:
            raise UserError(
                f"executor: ray: {self.lost} actors were lost one after the other with the same block: {first}",
                f"Where memory is short, lower workers or max_document_bytes. {AGAIN}",
            )
        log.warning("executor: ray: an actor was lost, another does its blocks again: %s", first)
        self.actor = self.pool.start()
        self.sent = deque((work, self.actor.run.remote(work)) for work, _ in self.sent)
