"""Two hosts that are network namespaces with a real sshd each: every way of launching,
ZeRO 1-3, a slow and lossy network, a killed rank, a dead host.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

import launch
from fastft import track

SSHD = "/usr/sbin/sshd"
BIN = Path(sys.executable).parent


class Hosts:
    """Namespaces 10.77.X.1 and 10.77.X.2 on a bridge, an sshd in each; an ``ssh`` first on PATH that knows the key."""

    def __init__(self, folder: Path):
        self.folder, self.number = folder, os.getpid() % 250 + 1
        self.bridge = f"ftbr{self.number}"
        self.names = [f"ft{self.number}n{i}" for i in (1, 2)]
        self.addresses = [f"10.77.{self.number}.{i}" for i in (1, 2)]
        self.daemons: list[subprocess.Popen] = []

    def up(self) -> None:
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "link", "set", self.bridge, "up")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / "key")
        shutil.copy(self.folder / "key.pub", self.folder / "authorized")
        Path("/run/sshd").mkdir(exist_ok=True)
        for name, address in zip(self.names, self.addresses, strict=True):
            run("ip", "netns", "add", name)
            run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
            run("ip", "link", "set", name, "master", self.bridge, "up")
            self.inside(name, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self.inside(name, "ip", "link", "set", device, "up")
            (self.folder / f"sshd-{name}").write_text(
                f"Port 22\nListenAddress {address}\nHostKey {self.folder}/key\n"
                f"AuthorizedKeysFile {self.folder}/authorized\nUsePAM no\nStrictModes no\n"
                f"PermitRootLogin yes\nPidFile none\n"
            )
            command = ["ip", "netns", "exec", name, SSHD, "-D", "-e", "-f", self.folder / f"sshd-{name}"]
            with open(self.folder / f"{name}.log", "w") as log:
                self.daemons.append(subprocess.Popen(command, stderr=log))
        (self.folder / "ssh_config").write_text(
            f"Host *\n IdentityFile {self.folder}/key\n StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n"
            " LogLevel ERROR\n"
        )
        wrapper = self.folder / "bin" / "ssh"
        wrapper.parent.mkdir()
        wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {self.folder}/ssh_config "$@"\n')
        wrapper.chmod(0o755)
        (self.folder / "hosts").write_text("".join(f"{a} slots=1\n" for a in self.addresses))
        deadline = time.monotonic() + 20
        while any(self.inside(self.names[0], wrapper, a, "true", check=False).returncode for a in self.addresses):
            assert time.monotonic() < deadline, [(self.folder / f"{n}.log").read_text() for n in self.names]
            time.sleep(0.2)

    def down(self) -> None:
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        for name in self.names:
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            for pid in map(int, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", self.bridge], check=False)

    def inside(self, name: str, *command, check: bool = True) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["ip", "netns", "exec", name, *map(str, command)], check=check, capture_output=True, text=True
        )

    def start(self, host: int, *command, env: dict | None = None) -> subprocess.Popen:
        path = f"{self.folder}/bin:{BIN}:{os.environ['PATH']}"
        return launch.start(
            ["ip", "netns", "exec", self.names[host], *command],
            {
                "PATH": path,
                "GLOO_SOCKET_IFNAME": "eth0",
                "PDSH_RCMD_TYPE": "ssh",
                "PYTHONPATH": str(launch.ROOT),
                **(env or {}),
            },
            cwd=launch.ROOT,
        )

    def kill(self, host: int, part: str) -> None:
        for pid in self.pids(host, part):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def pids(self, host: int, part: str) -> list[int]:
        """Processes on a host whose command line has ``part``."""
        found = []
        for pid in self.inside(self.names[host], "ip", "netns", "pids", self.names[host]).stdout.split():
            try:
                if part.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "):
                    found.append(int(pid))
            except OSError:
                continue
        return found


def run(*command) -> None:
    subprocess.run([str(c) for c in command], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts():
    missing = [tool for tool in ("ip", "ssh", "ssh-keygen", SSHD) if not shutil.which(tool)]
    if os.geteuid() or missing:
        pytest.skip(f"needs root, iproute2 and openssh-server; not here: {missing or 'root'}")
    folder = Path(tempfile.mkdtemp(prefix="hosts-", dir="/tmp"))
    hosts = Hosts(folder)
    try:
        try:
            hosts.up()
        except subprocess.CalledProcessError as e:
            pytest.skip(f"network namespaces cannot be made here: {e.stderr!r}")
        yield hosts
    finally:
        hosts.down()
        shutil.rmtree(folder)


@pytest.fixture
def config(lm_config, tmp_path) -> dict:
    lm_config["train"] = {"steps": 4, "log_every": 1}
    lm_config["data"]["cache"] = str(tmp_path / "prepared")
    return lm_config


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in track.read(run) if r["kind"] == "train"]


def on_one_host(config: dict, tmp_path: Path) -> tuple[Path, list[float]]:
    """The configuration's file, and the losses of two ranks side by side."""
    path = launch.write_config(tmp_path / "c.yaml", config)
    launch.ranks(2, ["-m", "fastft", "train", path, f"run.dir={tmp_path}/here"])
    return path, losses(tmp_path / "here")


@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long), 3])
def test_two_hosts_give_the_losses_of_one(hosts, config, tmp_path, zero):
    config["parallel"] = {"zero": zero}
    path, truth = on_one_host(config, tmp_path)
    assert between_hosts(hosts, path, tmp_path) == truth and len(truth) == 4
    assert not hosts.pids(1, "fastft")


def test_every_launcher_gives_the_same_run(hosts, config, tmp_path):
    """`deepspeed --hostfile` through launch/multinode.sh (pdsh if it is there, else ssh); torchrun on each host."""
    config["parallel"] = {"zero": 2}
    path, truth = on_one_host(config, tmp_path)
    process = hosts.start(
        0,
        launch.ROOT / "launch" / "multinode.sh",
        "-H",
        hosts.folder / "hosts",
        "train",
        path,
        f"run.dir={tmp_path}/deepspeed",
        env={"MASTER_PORT": str(launch.free_port())},
    )
    output = launch.finish(process, 150)
    assert process.returncode == 0, output[-3000:]
    assert losses(tmp_path / "deepspeed") == truth
    port = str(launch.free_port())
    nodes = [
        hosts.start(
            i,
            BIN / "torchrun",
            "--nnodes",
            "2",
            "--nproc-per-node",
            "1",
            "--node-rank",
            str(i),
            "--master-addr",
            hosts.addresses[0],
            "--master-port",
            port,
            "-m",
            "fastft",
            "train",
            path,
            f"run.dir={tmp_path}/torchrun",
        )
        for i in range(2)
    ]
    outputs = [launch.finish(node, 120) for node in nodes]
    assert [n.returncode for n in nodes] == [0, 0], outputs[0][-3000:]
    assert losses(tmp_path / "torchrun") == truth


@pytest.mark.long
@pytest.mark.parametrize("trouble", ["netem delay 5ms loss 1%", "tbf rate 20mbit burst 32kb latency 100ms"])
def test_a_slow_or_lossy_network_changes_nothing_but_time(hosts, config, tmp_path, trouble):
    path, truth = on_one_host(config, tmp_path)
    if (
        tc := hosts.inside(hosts.names[1], "tc", "qdisc", "add", "dev", "eth0", "root", *trouble.split(), check=False)
    ).returncode:
        pytest.skip(f"this kernel has no {trouble.split()[0]}: {tc.stderr.strip()}")
    try:
        assert between_hosts(hosts, path, tmp_path) == truth
    finally:
        hosts.inside(hosts.names[1], "tc", "qdisc", "del", "dev", "eth0", "root")


@pytest.mark.long  # beside the slow network, whose packets arrive
def test_lost_packets_change_nothing_but_time(hosts, config, tmp_path):
    """Every fiftieth packet between the hosts, at random, is dropped; also where the kernel has no netem."""
    if not shutil.which("iptables"):
        pytest.skip("needs iptables")
    rule = ["INPUT", "-i", "eth0", "-m", "statistic", "--mode", "random", "--probability", "0.02", "-j", "DROP"]
    path, truth = on_one_host(config, tmp_path)
    if (made := hosts.inside(hosts.names[1], "iptables", "-A", *rule, check=False)).returncode:
        pytest.skip(f"this kernel's iptables has no statistic match: {made.stderr.strip()}")
    try:
        assert between_hosts(hosts, path, tmp_path) == truth
        dropped = int(
            hosts.inside(hosts.names[1], "iptables", "-L", "INPUT", "-v", "-n", "-x").stdout.splitlines()[2].split()[0]
        )
        assert dropped > 0
    finally:
        hosts.inside(hosts.names[1], "iptables", "-D", *rule)


def between_hosts(hosts, path: Path, tmp_path: Path) -> list[float]:
    """The losses of the configuration under `fastft launch` over both hosts."""
    process = hosts.start(
        0,
        sys.executable,
        "-m",
        "fastft",
        "launch",
        "--hostfile",
        hosts.folder / "hosts",
        "train",
        path,
        f"run.dir={tmp_path}/there",
    )
    output = launch.finish(process, 150)
    assert process.returncode == 0, output[-3000:]
    return losses(tmp_path / "there")


def started(hosts, config: dict, tmp_path: Path, *options: str) -> subprocess.Popen:
    config["train"] = {"steps": 4000, "log_every": 1}
    config["checkpoint"] = {"every": 5}
    path = launch.write_config(tmp_path / "c.yaml", config)
    process = hosts.start(
        0, sys.executable, "-m", "fastft", "launch", "--hostfile", hosts.folder / "hosts", *options, "train", path
    )
    run = tmp_path / "run"
    deadline = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or len(losses(run)) < 6:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    return process


def test_a_rank_killed_on_the_other_host_is_named_and_nothing_stays(hosts, config, tmp_path):
    process = started(hosts, config, tmp_path, "--max-restarts", "0")
    os.kill(hosts.pids(1, "-m fastft train")[0], signal.SIGKILL)
    output = launch.finish(process, 30)
    assert process.returncode == 137 and f"rank 1 on {hosts.addresses[1]} was ended by SIGKILL" in output, output[
        -2000:
    ]
    assert not hosts.pids(0, "fastft train") and not hosts.pids(1, "fastft")


def test_a_killed_launcher_leaves_nothing_on_any_host(hosts, config, tmp_path):
    process = started(hosts, config, tmp_path)
    launcher = [
        p for p in hosts.pids(0, "fastft launch") if (Path(f"/proc/{p}/comm").read_text().strip()).startswith("python")
    ]
    for pid in launcher:
        os.kill(pid, signal.SIGKILL)
    launch.finish(process, 10)
    deadline = time.monotonic() + 10
    while hosts.pids(0, "fastft") or hosts.pids(1, "fastft"):
        assert time.monotonic() < deadline, "ranks stay behind"
        time.sleep(0.1)
    assert process.returncode != 0


@pytest.mark.parametrize("far_side", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_dead_host_is_named(hosts, config, tmp_path, far_side):
    """The cable is pulled: the launcher names the host; the ranks on the far side, which nobody reaches, end by
    themselves after half a minute.
    """
    process = started(hosts, config, tmp_path, "--max-restarts", "0")
    run("ip", "link", "set", hosts.names[1], "down")
    try:
        output = launch.finish(process, 60)
        assert process.returncode != 0 and hosts.addresses[1] in output and "connection" in output, output[-2000:]
        deadline = time.monotonic() + 60
        while hosts.pids(1, "fastft"):
            if not far_side:
                hosts.kill(1, "fastft")
            assert time.monotonic() < deadline, "the far ranks stay"
            time.sleep(0.2)
        assert not hosts.pids(0, "fastft train")
    finally:
        run("ip", "link", "set", hosts.names[1], "up")


def test_preflight_over_two_hosts(hosts, config, tmp_path):
    """A table and 0; then each real fault with the host's name: a run.dir that is not shared,
    a slow link, a host that cannot be reached.
    """
    path = launch.write_config(tmp_path / "c.yaml", config)
    shared = tmp_path / "shared"

    def preflight(*more: str, hostfile: Path = hosts.folder / "hosts") -> tuple[int, str]:
        process = hosts.start(
            0, sys.executable, "-m", "fastft", "preflight", path, f"run.dir={shared}", "--hostfile", hostfile, *more
        )
        output = launch.finish(process, 90)
        assert "Traceback" not in output, output
        return process.returncode, output

    code, output = preflight()
    assert code == 0 and "2 hosts: nothing is wrong." in output and "MB/s" in output, output
    hosts.inside(
        hosts.names[1],
        "tc",
        "qdisc",
        "add",
        "dev",
        "eth0",
        "root",
        "tbf",
        "rate",
        "200mbit",
        "burst",
        "64kb",
        "latency",
        "50ms",
    )
    try:
        code, output = preflight()
    finally:
        hosts.inside(hosts.names[1], "tc", "qdisc", "del", "dev", "eth0", "root")
    assert code == 1 and f"{hosts.addresses[1]}:" in output and "the median is" in output, output
    (hosts.folder / "three").write_text((hosts.folder / "hosts").read_text() + f"10.77.{hosts.number}.9 slots=1\n")
    code, output = preflight(hostfile=hosts.folder / "three")
    assert code == 1 and f"10.77.{hosts.number}.9: cannot be asked" in output, output
