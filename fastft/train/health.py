"""What ranks tell each other so that no run goes on wrong: the same code and settings, the same weights, the same
speed.
"""

import hashlib
import os
import platform
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from fastft import config as configuration
from fastft.config import Config
from fastft.errors import UserError
from fastft.launch.probe import code_hash
from fastft.ranks import Ranks
from fastft.versions import versions

SHARED_SECONDS = 30.0  # until a file must be seen by all hosts: network disks keep what they knew of a folder a while
SLOW = 1.5  # times the median of all ranks
SLOW_SECONDS = 0.05  # and so much longer between two readings: less is the noise of short steps


def check_agreement(config: Config, data_key: str, ranks: Ranks) -> None:
    """Refuse ranks that would run different things.

    Raises
    ------
    UserError
        On every rank: names the rank that differs from rank 0, and in what.
    """
    everyone = ranks.gather(_facts(config, data_key))
    wrong = [
        f"rank {rank} has {name} {theirs[name]}, rank 0 has {first}"
        for rank, theirs in enumerate(everyone)
        for name, first in everyone[0].items()
        if theirs[name] != first
    ]
    if wrong:
        raise UserError(
            "The ranks do not agree: " + "; ".join(wrong[:4]) + ".",
            "Every host needs the same configuration, data, packages and code.",
        )


def check_shared(run_dir: Path, ranks: Ranks) -> None:
    """Refuse a run folder that is not the same for all ranks: a checkpoint is the files of all of them.

    Raises
    ------
    UserError
        On every rank: names the hosts that do not see what rank 0 writes.
    """
    if ranks.alone:
        return
    marker = run_dir / ranks.from_main(f".ranks-{uuid.uuid4().hex}")
    if ranks.main:
        marker.touch()
    ranks.barrier()
    deadline = time.monotonic() + SHARED_SECONDS
    while not (found := marker.exists()) and time.monotonic() < deadline:
        with suppress(OSError):
            os.listdir(run_dir)  # has a network disk ask again
        time.sleep(0.2)
    everyone = ranks.gather(None if found else f"rank {ranks.rank} on {socket.gethostname()}")
    if ranks.main:
        marker.unlink(missing_ok=True)
    if blind := [who for who in everyone if who]:
        raise UserError(
            f"run.dir: {run_dir} is not the folder that rank 0 writes to for {', '.join(blind[:4])}"
            f"{f' and {len(blind) - 4} more' if len(blind) > 4 else ''}.",
            "Put run.dir on a disk that all hosts share; a checkpoint is the files of all ranks.",
        )


def _facts(config: Config, data_key: str) -> dict[str, str]:
    found = versions()
    return {
        **found,
        "python": platform.python_version(),
        "fastft": f"{found['fastft']} (code {code_hash()})",
        "seed": str(config.run.seed),
        "data": data_key,
        "settings": hashlib.sha256(configuration.dump(config).encode()).hexdigest()[:12],
    }


def check_weights(model: torch.nn.Module, ranks: Ranks, step: int) -> None:
    """Refuse to go on when replicated weights differ between ranks (a flipped bit, a lost update). Not for ZeRO-3,
    which holds a part each.

    Raises
    ------
    UserError
        On every rank: names the ranks in the minority, where there is a majority.
    """
    total = torch.zeros((), dtype=torch.int64, device=ranks.device)
    for i, parameter in enumerate(model.parameters()):
        bits = parameter.detach().contiguous().view({4: torch.int32, 2: torch.int16}[parameter.element_size()])
        total += bits.sum(dtype=torch.int64) * (2 * i + 1)
    values = [int(s) for s in ranks.gather_tensor(total)]
    usual = max(set(values), key=values.count)
    if odd := [rank for rank, value in enumerate(values) if value != usual]:
        message = "the weights differ between ranks, and no majority says which are right"
        if values.count(usual) > ranks.world / 2:
            named, others = ", ".join(map(str, odd)), ranks.world - len(odd)
            message = f"the weights of rank {named} differ from those of the other {others}"
        raise UserError(
            f"step {step}: {message}.",
            "Resume from the newest checkpoint before this step, and have that machine's memory checked.",
        )


class ForwardTimer:
    """Time that this rank spends in the forward, where it waits for no other (but under ZeRO-3, which gathers weights
    there).
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, 0.0
        self.events: list[tuple] = []
        self.start: Any = None

    def __enter__(self) -> None:
        if self.device.type == "cuda":  # the host runs ahead of the device: its clock would say nothing
            self.start = torch.cuda.Event(enable_timing=True)
            self.start.record()
        else:
            self.start = time.perf_counter()

    def __exit__(self, *exc) -> None:
        if self.device.type == "cuda":
            end = torch.cuda.Event(enable_timing=True)
            end.record()
            self.events.append((self.start, end))
        else:
            self.seconds += time.perf_counter() - self.start

    def slow_ranks(self, ranks: Ranks) -> dict[int, float]:
        """Ranks that took over 1.5 times the median since the last call, and how many times. All ranks together."""
        if self.events:
            self.events[-1][1].synchronize()
            self.seconds += sum(start.elapsed_time(end) for start, end in self.events) / 1000
        mine = torch.tensor([self.seconds], dtype=torch.float64, device=ranks.device)
        self.seconds, self.events = 0.0, []
        seconds = torch.cat(ranks.gather_tensor(mine))
        others = torch.stack([torch.cat([seconds[:r], seconds[r + 1 :]]).median() for r in range(ranks.world)])
        return {
            r: round(float(seconds[r] / others[r]), 2)
            for r in range(ranks.world)
            if seconds[r] > max(SLOW * others[r], others[r] + SLOW_SECONDS)
        }
