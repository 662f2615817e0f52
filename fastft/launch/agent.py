"""One host's ranks: started, watched and ended together.

``python -m fastft.launch.agent`` runs on every host and speaks with the launcher as fastft.launch.protocol says. When
the launcher is gone, or not heard for SILENCE seconds, the ranks are killed.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from fastft.launch import protocol
from fastft.launch.protocol import BEAT, Beat, Spec  # noqa: F401  # BEAT: for those who know it by this module

GRACE = 2.0  # seconds that the other ranks get to say why they fail, once one has
GRACE_STOPPING = 600.0  # the same after a signal that asked them to save and leave
FIRST = 5.0  # times the watchdog: process groups, engines and checkpoints take longer than a step
UNKILLABLE = 20.0  # seconds after SIGKILL until a rank that waits for a disk is left behind
SILENCE = 30.0  # seconds without a word from the launcher


class Rank:
    """One process and the file that it writes to."""

    def __init__(self, spec: Spec, local: int):
        self.rank = spec.first_rank + local
        logs = Path(spec.logs)
        self.log, self.beat, self.mistake = (logs / f"rank-{self.rank}.{kind}" for kind in ("log", "beat", "mistake"))
        protocol.new_beat(self.beat)
        self.waits = 0  # times in a row that it was seen to wait in the kernel, once it was killed
        self.mistake.unlink(missing_ok=True)
        env = {
            **protocol.without_others(os.environ),
            **spec.env,
            "RANK": str(self.rank),
            "LOCAL_RANK": str(local),
            "WORLD_SIZE": str(spec.world),
            "LOCAL_WORLD_SIZE": str(spec.ranks),
            "LOCAL_SIZE": str(spec.ranks),
            "GROUP_RANK": str(spec.node),
            "MASTER_ADDR": spec.master_addr,
            "MASTER_PORT": str(spec.master_port),
            protocol.AGENT: str(os.getpid()),
            protocol.HEARTBEAT: str(self.beat),
            protocol.MISTAKE: str(self.mistake),
            "PYTHONUNBUFFERED": "1",
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fastft", *spec.arguments],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def last_beat(self) -> Beat:
        return protocol.read_beat(self.beat)

    def signal(self, signum: int) -> None:
        if self.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signum)

    def state(self) -> str:
        """Of the main thread: R running, S sleeping, T stopped, Z ended (proc(5)).

        D where any thread of a process that is not stopped waits for a disk.
        """
        main, states = str(self.process.pid), {}
        for stat in Path(f"/proc/{main}/task").glob("*/stat"):
            with suppress(OSError):
                states[stat.parent.name] = stat.read_text().rpartition(")")[2].split()[0]
        return "D" if "D" in states.values() and states.get(main) != "T" else states.get(main, "Z")

    def stack(self, frames: int = 15) -> str:
        """The main thread's innermost frames, from what SIGUSR1 made the rank write into its log."""
        lines = self.tail(200).splitlines()
        starts = [i for i, line in enumerate(lines) if line.startswith("Current thread")]
        return "\n".join(lines[starts[-1] : starts[-1] + frames + 1]) if starts else ""

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


class Agent:
    def __init__(self, spec: Spec):
        self.spec = spec
        self.orders: queue.Queue[dict | None] = queue.Queue()
        self.heard = time.monotonic()
        Path(spec.logs).mkdir(parents=True, exist_ok=True)
        self.ranks = [Rank(spec, local) for local in range(spec.ranks)]
        self.shown = 0  # bytes of rank 0's log that were passed on
        self.code = 0
        self.grace = GRACE
        self.kill_at: float | None = None  # monotonic; when what is left is killed
        self.killed = False  # what is left was

    def run(self) -> int:
        threading.Thread(target=self._listen, daemon=True).start()
        open_ranks, left_behind = set(self.ranks), set()
        try:
            while open_ranks:
                self._obey()
                self._relay()
                for rank in [r for r in open_ranks if r.process.poll() is not None]:
                    open_ranks.discard(rank)
                    self._ended(rank)
                if self.spec.watchdog and self.kill_at is None:
                    self._watch(open_ranks)
                if self.kill_at is not None and time.monotonic() >= self.kill_at:
                    self._signal(signal.SIGKILL)
                    stuck = self._stuck(open_ranks, self.kill_at)
                    open_ranks -= stuck
                    left_behind |= stuck
                time.sleep(0.1)
        finally:
            self._signal(signal.SIGKILL)
            for rank in set(self.ranks) - left_behind:
                rank.process.wait()
        self._relay()
        say("done", code=self.code)
        return self.code

    def _stuck(self, open_ranks: set[Rank], killed_at: float) -> set[Rank]:
        """Ranks that wait in the kernel long after SIGKILL, every time one looks for two seconds."""
        if time.monotonic() < killed_at + UNKILLABLE:
            return set()
        for rank in open_ranks:
            rank.waits = rank.waits + 1 if rank.state() == "D" else 0
        stuck = {rank for rank in open_ranks if rank.waits >= 20}
        for rank in sorted(stuck, key=lambda r: r.rank):
            say("stuck", rank=rank.rank)
            self.code = self.code or -signal.SIGKILL
        return stuck

    def _listen(self) -> None:
        for line in sys.stdin:
            self.orders.put(json.loads(line))
        self.orders.put(None)

    def _obey(self) -> None:
        while not self.orders.empty():
            order = self.orders.get()
            self.heard = time.monotonic()
            if order is None:
                self._give_up("the launcher is gone")
            elif "signal" in order:
                self._signal(order["signal"])
                self.grace = GRACE_STOPPING
                if order["signal"] == signal.SIGKILL:
                    self.kill_at = time.monotonic()
        if time.monotonic() - self.heard > SILENCE:
            self._give_up(f"the launcher has not been heard for {SILENCE:.0f} s")

    def _give_up(self, why: str) -> None:
        self.code = self.code or 1
        self.kill_at = time.monotonic()
        for rank in self.ranks:
            with open(rank.log, "a") as log:
                log.write(f"agent: {why}; this rank is killed\n")

    def _signal(self, signum: int) -> None:
        self.killed |= signum == signal.SIGKILL
        for rank in self.ranks:
            rank.signal(signum)

    def _ended(self, rank: Rank) -> None:
        code = rank.process.returncode
        mistake = protocol.read_mistake(rank.mistake)
        say(
            "exit",
            rank=rank.rank,
            code=code,
            killed=code == -signal.SIGKILL and self.killed,
            mistake=mistake,
            tail=rank.tail() if code else "",
        )
        if code:
            self.code = self.code or code
            if self.kill_at is None:
                self.kill_at = time.monotonic() + self.grace

    def _watch(self, open_ranks: set[Rank]) -> None:
        beats = {rank: rank.last_beat() for rank in open_ranks}
        silent = [
            rank
            for rank, (step, when) in beats.items()
            if step >= 0 and time.time() - when > self.spec.watchdog * (1.0 if step else FIRST)
        ]
        if not silent:
            return
        # Before SIGUSR1, which a stopped process only gets when it is continued.
        states = {rank: rank.state() for rank in silent}
        self._signal(signal.SIGUSR1)
        time.sleep(1.0)
        for rank in sorted(silent, key=lambda r: (states[r] not in ("T", "D"), r.rank)):  # why the others wait
            step, when = beats[rank]
            say(
                "hang",
                rank=rank.rank,
                step=step,
                silent=round(time.time() - when, 1),
                state=states[rank],
                stack=rank.stack(),
            )
        self.code = self.code or -signal.SIGKILL
        self.kill_at = time.monotonic()

    def _relay(self) -> None:
        """Pass on whole lines that rank 0 has written since."""
        if self.spec.first_rank:
            return
        with open(self.ranks[0].log, "rb") as log:
            log.seek(self.shown)
            text = log.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.shown += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            say("output", text=line)


def find_rank(run_dir: Path, rank: int | None = None) -> int | None:
    """Process id of a rank of a run on this host (of any, without a number), by the log that it writes to."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            log = Path(os.readlink(process / "fd" / "1"))
        except OSError:
            continue
        if run_dir.absolute() in log.parents and log.name in (f"rank-{rank}.log", log.name if rank is None else ""):
            return int(process.name)
    return None


def say(event: str, **fields: object) -> None:
    with suppress(OSError):  # nobody listens any more; the standard input's end says the same
        print(protocol.event_line(event, **fields), flush=True)


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches the launcher, which decides
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    spec = Spec.from_json(sys.stdin.readline())
    agent = Agent(spec)
    # A SIGTERM to every process of a job (a service manager, a shutdown) must not take the ranks from under their save.
    signal.signal(signal.SIGTERM, lambda *_: agent.orders.put(protocol.signal_order(signal.SIGTERM)))
    code = agent.run()
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
