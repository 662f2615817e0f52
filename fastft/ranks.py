"""The processes of a run: where this one is, and what they tell each other. Owns every ``if world > 1``."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from fastft.config import Config
from fastft.errors import UserError
from fastft.launch import protocol
from fastft.launch.hostfile import free_port

T = TypeVar("T")
_ALONE = itertools.count()  # of this process: all ranks wait for the same, in the same order


@dataclass(frozen=True)
class Ranks:
    """Where this process stands.

    Ranks form a grid: those of one ``data_rank`` hold parts of the same sequences, those of one ``sequence_rank`` the
    same parts of different ones. ``sequence_world`` is 1 unless sequences are cut over ranks; ``sequence_group`` is
    then the process group of those of this ``data_rank``.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    device: torch.device
    sequence_world: int = 1
    sequence_group: Any = None

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def sequence_rank(self) -> int:
        return self.rank % self.sequence_world

    @property
    def data_rank(self) -> int:
        return self.rank // self.sequence_world

    @property
    def data_world(self) -> int:
        return self.world // self.sequence_world

    def with_sequences(self, size: int) -> Ranks:
        """The grid in which each ``size`` ranks, one after the other, hold parts of the same sequences. Their group is
        that of ``with_group``. UserError where they do not divide.
        """
        if self.world % size:
            raise UserError(
                f"parallel.sequence: {size} ranks share a sequence, which {self.world} "
                f"rank{' does' if self.world == 1 else 's do'} not divide into.",
                f"Start a multiple of {size} ranks (fastft launch --nproc {size} ...), or set parallel.sequence "
                "to a divisor of their number.",
            )
        return replace(self, sequence_world=size)

    def with_group(self) -> Ranks:
        """Once all ranks are in the process group: the same, in groups that share sequences."""
        if self.sequence_world == 1:
            return self
        starts = range(0, self.world, self.sequence_world)
        groups = [dist.new_group(list(range(start, start + self.sequence_world))) for start in starts]
        return replace(self, sequence_group=groups[self.data_rank])

    def any(self, *here: bool) -> list[bool]:
        """For each condition, whether it holds on any rank."""
        return [bool(value) for value in self.max([int(value) for value in here])]

    def max(self, values: Sequence[int]) -> list[int]:
        """The largest of every rank's values (int32), one by one."""
        return self._reduced(values, torch.int32, dist.ReduceOp.MAX)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks, in float64."""
        return self._reduced(values, torch.float64, dist.ReduceOp.SUM)

    def sum_tensor(self, value: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of a tensor on this run's device, as a new one."""
        if self.world == 1:
            return value
        value = value.clone()
        dist.all_reduce(value)
        return value

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on all ranks; anything that pickles."""
        if self.world == 1:
            return [value]
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, value)
        return every

    def gather_data(self, value: T) -> list[T]:
        """The same of one rank for each ``data_rank``: where the others of its sequences have the same value."""
        return self.gather(value)[:: self.sequence_world]

    def gather_tensor(self, value: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's tensor, of one shape and dtype on all."""
        if self.world == 1:
            return [value]
        every = [torch.empty_like(value) for _ in range(self.world)]
        dist.all_gather(every, value)
        return every

    def from_main(self, value: T) -> T:
        """Rank 0's value, on all ranks."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def seed(self, seed: int) -> None:
        """Random numbers of training (dropout masks), different ones on every rank: two ranks with the same masks
        would train on half as many. Of rank 0, torch's go on where the model's initialization ended.
        """
        own = (seed * 2654435761 + self.rank * 40503) % 2**32  # far apart for neighbors (Knuth's multiplicative hash)
        random.seed(own)
        np.random.seed(own)
        if self.rank:
            torch.manual_seed(own)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def main_alone(self) -> Iterator[None]:
        """Around what rank 0 does alone, which may take longer than a collective may (ten minutes by default): the
        others wait until it is done, and raise what it raises.

        They ask the store by which the ranks met: a wait in it would keep NCCL's own threads from it.
        """
        if self.world == 1:
            yield
            return
        key, store = f"fastft/main/{next(_ALONE)}", dist.distributed_c10d._get_default_store()
        if self.main:
            try:
                yield
            except BaseException as e:
                said = [e.message, e.hint] if isinstance(e, UserError) else [f"rank 0: {type(e).__name__}: {e}"]
                store.set(key, json.dumps(said))
                raise
            store.set(key, "[]")
        else:
            yield
            while not store.check([key]):
                time.sleep(0.1)
            if said := json.loads(store.get(key)):
                raise UserError(*said) if len(said) == 2 else RuntimeError(*said)
        dist.barrier()

    def _reduced(self, values: Sequence, dtype: torch.dtype, how: Any) -> list:
        if self.world == 1:
            return list(values)
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total, op=how)
        return total.tolist()


# What starters of processes that set no RANK call size, rank, local rank and, where they say it, local size.
STARTERS = {
    "Open MPI": tuple(f"OMPI_COMM_WORLD_{part}" for part in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")),
    "MVAPICH": tuple(f"MV2_COMM_WORLD_{part}" for part in ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")),
    "MPI": ("PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID"),
    "flux": ("FLUX_JOB_SIZE", "FLUX_TASK_RANK", "FLUX_TASK_LOCAL_ID"),
}
UNSET = f"Unset what another job left in this shell: unset {' '.join((*protocol.PLACE, *protocol.LOCAL))}"


def _settle(env: Any) -> None:
    """Make the environment say where this process stands: alone, unless a launcher says otherwise.

    Raises
    ------
    UserError
        It says half of it, or is one of several processes that would each train alone.
    """
    if "RANK" not in env:
        for starter, (size, rank, *local) in STARTERS.items():
            if env.get(size, "").isdigit() and int(env[size]) > 1 and rank in env:
                _take(env, starter, size, rank, *local)
                break
    here = [name for name in protocol.PLACE if name in env]
    if "RANK" not in env or (len(here) < len(protocol.PLACE) and env.get("WORLD_SIZE") == "1"):
        for name in set(env) - protocol.without_others(env).keys():  # halves of another job's
            del env[name]
        env.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
        return
    if missing := [name for name in (*protocol.PLACE, "LOCAL_RANK") if name not in env]:
        raise UserError(
            f"{', '.join(here)} {'is' if len(here) == 1 else 'are'} set in the environment, but "
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not.",
            f"A launcher sets all of them: `fastft launch`, torchrun, deepspeed. To train in one process: "
            f"{UNSET[0].lower()}{UNSET[1:]}",
        )


def _take(env: Any, starter: str, size: str, rank: str, local: str, local_size: str = "") -> None:
    if not {"MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        raise UserError(
            f"{size}={env[size]}: this is process {env[rank]} of {env[size]} that {starter} started, and MASTER_ADDR "
            "and MASTER_PORT do not say where they meet: each would train alone.",
            "Set both for all processes (the first host's address, a free port), or start them with `fastft launch`.",
        )
    env.update(RANK=env[rank], WORLD_SIZE=env[size], LOCAL_RANK=env.get(local, "0"))
    if local_size in env:
        env["LOCAL_WORLD_SIZE"] = env[local_size]


def _check_address(name: str) -> None:
    try:
        socket.getaddrinfo(name, None)
    except OSError as e:
        raise UserError(f"MASTER_ADDR={name}: {e.strerror or e}.", f"Give the first host's address. {UNSET}") from None


def _number(env: Any, name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise UserError(f"{name}={env[name]!r} in the environment is no number.", UNSET) from None


def environment(config: Config) -> Ranks:
    """Read (or, without a launcher, set) the torch.distributed environment, and set threads and device. Starts
    nothing.
    """
    env = os.environ
    _settle(env)
    rank, world, local_rank = (_number(env, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if not 0 < _number(env, "MASTER_PORT") < 1 << 16:
        raise UserError(f"MASTER_PORT={env['MASTER_PORT']} in the environment is no port (1 to 65535).", UNSET)
    if world > 1:
        _check_address(env["MASTER_ADDR"])
    if not 0 <= rank < world:
        raise UserError(f"RANK={rank} is not one of the {world} ranks of WORLD_SIZE={world}.", UNSET)
    alone = world if env["MASTER_ADDR"] in ("127.0.0.1", "localhost") else 1
    local_world = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or alone)
    env.setdefault("LOCAL_SIZE", str(local_world))  # DeepSpeed's CPU accelerator counts devices by it
    cuda = torch.cuda.is_available()
    if config.run.device == "cuda" and not cuda:
        raise UserError(
            "run.device: cuda, but torch sees no CUDA device.",
            "`fastft doctor` shows what is there; or set run.device: auto.",
        )
    device = torch.device("cuda", local_rank) if cuda and config.run.device != "cpu" else torch.device("cpu")
    if device.type == "cpu":
        env["DS_ACCELERATOR"] = "cpu"
        torch.set_num_threads(config.run.threads or max(1, len(os.sched_getaffinity(0)) // local_world))
        if config.parallel.zero == 3:
            give_heap_back()
    else:
        torch.cuda.set_device(device)
        if config.run.deterministic:
            env.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS begins
            torch.use_deterministic_algorithms(True)
            fill: Any = torch.utils.deterministic
            fill.fill_uninitialized_memory = False  # it would write every new tensor
    return Ranks(rank, world, local_rank, local_world, device)


def keep_heap(device: torch.device, sharded: bool) -> None:
    """Tell glibc to keep freed memory: by default it unmaps every large array on free, and the next one costs page
    faults. Of a process that computes on a CPU; not where weights are sharded (`give_heap_back`).

    A training step frees and takes the same arrays over and over. Measured on a 6-layer BERT, batch 32, 2 cores:
    1,270 -> 1,510 tokens/s.
    """
    if device.type == "cpu" and not sharded:
        if (libc := _glibc()) is not None:
            libc.malloc_trim(0)  # what loading and the checks before have left in between
        _mallopt({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1})  # read as the largest size_t: never trim


def give_heap_back() -> None:
    """Tell glibc to return every array of 128 KiB and more to the system when it is freed: by default what is freed
    once raises that limit to 32 MiB. Of a process that holds weights in shards (ZeRO 3), which is there to save memory:
    those that are gathered and let go of left holes that took a quarter of all.
    """
    _mallopt({M_MMAP_THRESHOLD: 1 << 17})


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h


def _mallopt(options: dict[int, int]) -> None:
    if (libc := _glibc()) is not None:
        for option, value in options.items():
            libc.mallopt(option, value)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    libc = ctypes.CDLL(None)
    return libc if sys.platform == "linux" and hasattr(libc, "gnu_get_libc_version") else None
