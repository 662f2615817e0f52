"""`fastft launch`: an agent on every host, all of them ended when one fails,
the run resumed from its newest checkpoint.
"""

import json
import os
import queue
import shlex
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path

from fastft.errors import UserError
from fastft.launch import protocol
from fastft.launch.hostfile import Host, address, free_port, is_here, port_free
from fastft.launch.protocol import Spec

# What the ranks on other hosts need of this environment. It travels through ssh's standard input: nothing of it is in a
# command line.
FORWARDED = (
    "CUDA_",
    "DS_",
    "FASTFT_",
    "GLOO_",
    "HF_",
    "LD_LIBRARY_PATH",
    "NCCL_",
    "OMP_",
    "PATH",
    "PYTHONPATH",
    "TOKENIZERS_",
    "TORCH_",
    "TRANSFORMERS_",
    "UCX_",
    "XDG_",
)
SSH = (
    "ssh",
    "-T",
    "-o",
    "BatchMode=yes",
    "-o",
    "ConnectTimeout=10",
    "-o",
    "ServerAliveInterval=5",
    "-o",
    "ServerAliveCountMax=2",
)
BEAT = 5.0  # seconds between two words to the agents
STOP_LIMIT = 660.0  # seconds that the agents get to end their ranks; a second signal ends them at once
AGENT = "fastft.launch.agent"
MISTAKE, STOPPED, DIED, FAILED = "mistake", "stopped", "died", "failed"  # how an attempt ended
BETTER = {DIED: (FAILED,), MISTAKE: (FAILED, DIED)}  # explains more than these, which may have followed from it
# What ends a rank from outside (out of memory, a broken machine) or in its own code, and never follows from another
# rank's end. SIGABRT does: NCCL's watchdog raises it where a peer is gone.
DEADLY = {signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE}


@dataclass(frozen=True)
class Plan:
    """What to start, and how."""

    arguments: list[str]  # of fastft: a verb and what belongs to it
    hosts: list[Host]
    run_dir: Path  # as every host sees it
    master_addr: str
    master_port: int | None = None  # None: a free one
    max_restarts: int = 3
    backoff: float = 5.0  # seconds before the first restart; doubled each time, at most 300
    watchdog: float = 600.0
    python: str = sys.executable  # on every host
    ssh: tuple[str, ...] = SSH

    # What the run's folder is marked with once its rank 0 has taken it.
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def logs(self, attempt: int) -> Path:
        return self.run_dir / "logs" / f"attempt-{attempt}"

    def claimed(self) -> bool:
        """Whether the run in run_dir is the one that this launch began or resumed."""
        mark = self.run_dir / "logs" / "claimed"
        return mark.is_file() and mark.read_text() == self.id


def plan(arguments: list[str], hosts: list[Host], run_dir: Path, *, master_addr: str | None = None, **more) -> Plan:
    """A plan with its master address settled: the first host's own, which the others must be able to reach.

    Raises
    ------
    UserError
        A host is unknown, or the first of several hosts has a loopback address.
    """
    found = master_addr or address(hosts[0].name)
    if len(hosts) > 1 and found.startswith("127."):
        raise UserError(
            f"{hosts[0].name} is {found} here, which other hosts cannot reach.",
            "Give --master-addr, the first host's address on the network between them.",
        )
    port = more.get("master_port")
    if port and is_here(found) and not port_free(found, port):
        raise UserError(f"--master-port {port}: another process listens on it at {found}.", "Choose another one.")
    return Plan(arguments, hosts, run_dir.absolute(), found, **more)


def describe(plan: Plan) -> list[str]:
    """The command of every host, one a line, without environment values."""
    return [
        f"{host.name}: {shlex.join(remote_command(plan, host, AGENT))}"
        f"  # ranks {first} to {first + host.slots - 1}: {shlex.join(plan.arguments)}"
        for host, first in zip(plan.hosts, _firsts(plan.hosts), strict=True)
    ]


def launch(plan: Plan) -> int:
    """Run to the end, with restarts. Returns the exit code: 0, or the first failed rank's (128 + N for signal N)."""
    stop = _Signals()
    older = (int(p.name.removeprefix("attempt-")) for p in (plan.run_dir / "logs").glob("attempt-*"))
    attempt = max(older, default=0)  # their logs stay
    first, failures = attempt + 1, 0
    reached = newest_step(plan.run_dir)
    while True:
        attempt += 1
        outcome = _Attempt(plan, attempt, attempt == first, stop).run()
        if outcome.code == 0 or outcome.kind not in (DIED, FAILED):
            return outcome.code
        failures = failures + 1 if newest_step(plan.run_dir) == reached else 1  # what got further may fail again
        reached = newest_step(plan.run_dir)
        if failures > plan.max_restarts:
            print(
                f"launch: failed {failures} times without a newer checkpoint; giving up. Logs: {plan.run_dir / 'logs'}",
                file=sys.stderr,
            )
            if reached and len(plan.hosts) > 1:
                print(
                    "launch: on other hosts, or fewer, the run goes on from step "
                    f"{reached}: fastft launch --hostfile OTHER_HOSTS resume {plan.run_dir}",
                    file=sys.stderr,
                )
            return outcome.code
        wait = min(plan.backoff * 2 ** (failures - 1), 300.0)
        start = f"step {reached}" if reached and plan.claimed() else "the start"
        print(f"launch: restart {failures} of {plan.max_restarts} in {wait:.0f} s, from {start}", file=sys.stderr)
        if stop.wait(wait):
            return 128 + stop.signum


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0: none."""
    names = [p.parent.name.removeprefix("step-") for p in (run_dir / "checkpoints").glob("step-*/MANIFEST.json")]
    return max((int(name) for name in names if name.isdigit()), default=0)


class _Signals:
    """The signals that end a launcher, remembered."""

    def __init__(self):
        self.signum = self.count = 0
        self.seen = threading.Event()
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._catch)

    def _catch(self, signum: int, frame) -> None:
        self.signum = signum
        self.count += 1
        self.seen.set()

    def wait(self, seconds: float) -> bool:
        return self.seen.wait(seconds)


@dataclass
class _Outcome:
    code: int
    kind: str = FAILED


@dataclass
class _Node:
    host: Host
    process: subprocess.Popen
    ended: bool = False
    told: list[str] = field(default_factory=list)  # what ssh or Python said beside the events


class _Attempt:
    """One start of all ranks, until all of them have ended."""

    def __init__(self, plan: Plan, attempt: int, first: bool, stop: _Signals):
        self.plan, self.attempt, self.first, self.stop = plan, attempt, first, stop
        self.events: queue.Queue[tuple[_Node, dict | None]] = queue.Queue()
        self.outcome: _Outcome | None = None  # of the first thing that went wrong
        self.deadline: float | None = None
        self.passed_on = 0

    def run(self) -> _Outcome:
        plan = self.plan
        port = plan.master_port or (free_port(plan.master_addr) if is_here(plan.master_addr) else 29500 + self.attempt)
        arguments = plan.arguments if self.first else _again(plan)
        forwarded = {name: value for name, value in os.environ.items() if name.startswith(FORWARDED)}
        env = forwarded | {protocol.LAUNCH: plan.id}
        self.nodes = []
        for number, (host, first) in enumerate(zip(plan.hosts, _firsts(plan.hosts), strict=True)):
            spec = Spec(
                arguments,
                number,
                first,
                host.slots,
                sum(h.slots for h in plan.hosts),
                plan.master_addr,
                port,
                env,
                str(plan.logs(self.attempt)),
                plan.watchdog,
            )
            self.nodes.append(self._start(host, spec))
        spoken = time.monotonic()
        while not all(node.ended for node in self.nodes):
            try:
                node, event = self.events.get(timeout=0.2)
                self._took(node, event)
            except queue.Empty:
                pass
            if time.monotonic() - spoken > BEAT:
                spoken = time.monotonic()
                self._tell(protocol.STILL_HERE)
            self._pass_signal_on()
            if self.deadline is not None and time.monotonic() > self.deadline:
                for node in self.nodes:
                    node.process.kill()
        if self.outcome is None and self.stop.signum:
            return _Outcome(128 + self.stop.signum, STOPPED)
        return self.outcome or _Outcome(0)

    def _start(self, host: Host, spec: Spec) -> _Node:
        process = subprocess.Popen(
            remote_command(self.plan, host, AGENT),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        node = _Node(host, process)
        threading.Thread(target=self._read, args=(node,), daemon=True).start()
        _write(process, spec.to_json())
        return node

    def _read(self, node: _Node) -> None:
        assert node.process.stdout is not None  # a pipe
        try:
            for line in node.process.stdout:
                self.events.put((node, protocol.read_event(line)))
        finally:
            self.events.put((node, None))

    def _took(self, node: _Node, event: dict | None) -> None:
        if event is None:
            self._agent_ended(node)
            return
        name, where = event.pop("event"), f"on {node.host.name}"
        if name == "output":
            print(event["text"], flush=True)
        elif name == "told":
            node.told.append(event["text"].rstrip())
        elif name == "hang":
            doing = {"T": "is stopped", "D": "waits for a disk", "R": "computes", "S": "waits"}.get(
                event["state"], f"is in state {event['state']}"
            )
            self._failed(
                137,
                f"rank {event['rank']} {where} has taken no step for {event['silent']:.0f} s "
                f"(after step {event['step']}); it {doing}.\n{event['stack']}",
            )
        elif name == "stuck":
            self._failed(
                137,
                f"rank {event['rank']} {where} cannot be ended: it waits in the kernel, for a disk (or a driver) that "
                "does not answer, and ends when that does. Nothing is restarted before.",
                MISTAKE,
            )
        elif name == "exit" and event["code"]:
            self._rank_failed(event, where)

    def _rank_failed(self, event: dict, where: str) -> None:
        code = event["code"] if event["code"] > 0 else 128 - event["code"]
        who = f"rank {event['rank']} {where}"
        if event["mistake"]:
            self._failed(code, f"{who}: {event['mistake']}", MISTAKE)
        elif code in (128 + signal.SIGTERM, 128 + signal.SIGINT) and event["code"] > 0:
            self._failed(code, f"{who} was asked to stop and has saved.", STOPPED)
        else:
            how = (
                f"was ended by {signal.Signals(-event['code']).name}"
                if event["code"] < 0
                else f"failed with exit code {code}"
            )
            died = -event["code"] in DEADLY and not event["killed"]
            self._failed(code, f"{who} {how}.\n{event['tail']}", DIED if died else FAILED)

    def _agent_ended(self, node: _Node) -> None:
        node.ended = True
        code = node.process.wait()
        if code == 255 or (code and self.outcome is None):
            told = "\n".join(node.told[-15:])
            self._failed(
                code if code > 0 else 128 - code,
                f"{node.host.name}: the connection to it or its agent ended (exit code {code}).\n{told}",
            )

    def _failed(self, code: int, message: str, kind: str = FAILED) -> None:
        """The first failure decides the outcome and ends the others; what follows from it is not told. A busy machine
        may show first what followed, that a peer is gone: what explains more is told too, and decides.
        """
        if self.outcome is None or self.outcome.kind in BETTER.get(kind, ()):
            self.outcome = _Outcome(code, kind)
            print(f"launch: {message}", file=sys.stderr)
            if not (kind == STOPPED and self.stop.signum):
                self._tell(
                    protocol.signal_order(signal.SIGTERM if kind == STOPPED else signal.SIGKILL),
                    delay=0 if kind == STOPPED else 2.5,
                )
            self.deadline = time.monotonic() + STOP_LIMIT
        elif "has taken no step" in message or "cannot be ended" in message:
            print(f"launch: {message}", file=sys.stderr)

    def _pass_signal_on(self) -> None:
        if self.stop.count > self.passed_on:
            self.passed_on = self.stop.count
            name, again = signal.Signals(self.stop.signum).name, self.stop.count > 1
            what = "the ranks are ended" if again else "the ranks stop after this step and save; again: end now"
            print(f"launch: {name}: {what}", file=sys.stderr)
            self._tell(protocol.signal_order(self.stop.signum if self.stop.count == 1 else signal.SIGKILL))
            self.deadline = time.monotonic() + STOP_LIMIT

    def _tell(self, order: dict, delay: float = 0.0) -> None:
        if delay:  # other ranks may still say something better than that a peer is gone
            threading.Timer(delay, self._tell, [order]).start()
            return
        for node in self.nodes:
            if not node.ended:
                _write(node.process, json.dumps(order))


def _write(process: subprocess.Popen, line: str) -> None:
    assert process.stdin is not None  # a pipe
    try:
        process.stdin.write(line + "\n")
        process.stdin.flush()
    except (BrokenPipeError, ValueError):
        pass  # its end is seen where its output is read


def remote_command(plan: Plan, host: Host, module: str) -> list[str]:
    """The command that runs a module on a host: through ssh, unless the host is this one."""
    agent = [plan.python, "-m", module]
    if is_here(host.name):
        return agent
    where = f"cd {shlex.quote(os.getcwd())} && "
    path = f"PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])} " if os.environ.get("PYTHONPATH") else ""
    return [*plan.ssh, host.name, f"{where}{path}exec {shlex.join(agent)}"]


def _firsts(hosts: list[Host]) -> list[int]:
    """The first rank of every host."""
    return [sum(h.slots for h in hosts[:i]) for i in range(len(hosts))]


def _again(plan: Plan) -> list[str]:
    """The command of a restart: resume from the newest checkpoint, or start again over the run that this launch
    began; before it began one, the same command again.
    """
    if plan.arguments[0] == "train" and plan.claimed():  # else run_dir may hold somebody else's run
        if newest_step(plan.run_dir):
            return ["resume", str(plan.run_dir)]
        return plan.arguments if "--overwrite" in plan.arguments else [*plan.arguments, "--overwrite"]
    return plan.arguments
