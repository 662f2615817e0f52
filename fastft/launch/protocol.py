"""What launcher, agents and ranks tell each other: the one definition of every name and format between them.

    launcher -> agent   standard input, a JSON object a line: first the ``Spec``, then orders, ``STILL_HERE`` every few
                        seconds and ``signal_order(N)``. The end of the stream, or silence, means that the launcher or
                        the network is gone.
    agent -> launcher   standard output, a JSON object a line, an event each (``event_line``, ``read_event``).
    agent -> rank       the environment variables below, and signals: SIGUSR1 asks for the stacks of all threads.
    rank -> agent       two files that the environment names: its heartbeat, and the user's mistake that ended it.

Events, each with ``event``:

    output      ``text``: a line that rank 0 printed
    exit        ``rank``, ``code`` (negative: a signal), ``killed`` (the agent sent it), ``mistake`` (a UserError's text
                or null), ``tail`` (the end of its log)
    stuck       ``rank``, which no signal ends: it waits for a disk that does not answer
    hang        ``rank``, ``step``, ``silent`` (seconds), ``state`` (of the process, as in /proc), ``stack``
    done        ``code``: of the first rank that failed, or 0
    told        ``text``: a line that is no event (of ssh, or of Python); made by ``read_event`` alone

Only the standard library is imported here: an agent starts before torch is needed.
"""

import json
import os
import struct
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

# Environment variables. launch/*.sh, which start ranks without agents, mark theirs with FASTFT_LAUNCH_ID instead and
# find them by it in /proc; nothing in Python reads that one.
AGENT = "FASTFT_AGENT"  # process id of the agent, with which the rank is to end
HEARTBEAT = "FASTFT_HEARTBEAT"  # path of the rank's heartbeat, there before the rank is
MISTAKE = "FASTFT_MISTAKE"  # path for the text of a UserError: another try would meet the same
LAUNCH = "FASTFT_LAUNCH"  # id of the launch, with which rank 0 marks the run's folder as taken

# What launchers say of a process's place among others. fastft's own says it anew; what another one left is dropped.
PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # what torch.distributed reads
LOCAL = (
    *("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "NODE_RANK", "CROSS_RANK", "CROSS_SIZE"),
    *("GROUP_RANK", "GROUP_WORLD_SIZE", "ROLE_NAME", "ROLE_RANK", "ROLE_WORLD_SIZE"),
)

BEAT = struct.Struct("<qd")  # step, Unix time
UNWATCHED = -1  # as a heartbeat's step: what happens now takes as long as it takes

STILL_HERE = {"beat": True}


@dataclass(frozen=True)
class Spec:
    """What an agent starts."""

    arguments: list[str]  # of fastft
    node: int
    first_rank: int
    ranks: int  # on this host
    world: int
    master_addr: str
    master_port: int
    env: dict[str, str]
    logs: str  # folder, made when it is not there
    watchdog: float  # seconds without a step; 0: never

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> "Spec":
        return cls(**json.loads(line))


class Beat(NamedTuple):
    """The newest sign of life of a rank."""

    step: int  # UNWATCHED: nothing to watch
    when: float  # Unix time


def without_others(env: Mapping[str, str]) -> dict[str, str]:
    """An environment without what another launcher has said of ranks."""
    return {k: v for k, v in env.items() if k not in (*PLACE, *LOCAL) and not k.startswith("TORCHELASTIC_")}


def signal_order(signum: int) -> dict[str, Any]:
    """The order to send all ranks a signal."""
    return {"signal": int(signum)}


def event_line(event: str, **fields: object) -> str:
    return json.dumps({"event": event, **fields})


def read_event(line: str) -> dict[str, Any]:
    """The event of a line; what is no event, JSON or not, is one called ``told``."""
    try:
        event = json.loads(line)
    except json.JSONDecodeError:
        event = None
    return event if isinstance(event, dict) and "event" in event else {"event": "told", "text": line}


def new_beat(path: Path) -> None:
    """Make a heartbeat's file, or reset it: nothing to watch yet."""
    path.write_bytes(BEAT.pack(UNWATCHED, 0.0))


def open_beat() -> int | None:
    """A file descriptor of this process's heartbeat; None where no agent asks for one."""
    path = os.environ.get(HEARTBEAT)
    return os.open(path, os.O_WRONLY) if path else None


def write_beat(fd: int, step: int) -> None:
    """In one write, so that a reader never sees half of it."""
    os.pwrite(fd, BEAT.pack(step, time.time()), 0)


def read_beat(path: Path) -> Beat:
    return Beat(*BEAT.unpack(path.read_bytes()))


def write_mistake(text: str) -> None:
    """Tell the agent, where there is one, that the user has to change something before another try."""
    if path := os.environ.get(MISTAKE):
        Path(path).write_text(text, encoding="utf-8")


def read_mistake(path: Path) -> str | None:
    """The text of the UserError that ended a rank; None: something else did, or nothing."""
    return path.read_text(encoding="utf-8") if path.exists() else None
