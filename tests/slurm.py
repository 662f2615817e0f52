"""A real Slurm of two nodes (two slurmd on this machine), built in a temporary folder and taken down again."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import launch

CONF = """
ClusterName=fastft
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/{track}
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
KillWait=3
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs={cpus}
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs={cpus}
PartitionName=p Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


@contextmanager
def cluster(track: str = "pgid") -> Iterator[dict]:
    """The environment of a running Slurm, which knows a job's processes by their group or by cgroup; a short path, for
    munge's socket.
    """
    missing = [
        t
        for t in ("slurmctld", "slurmd", "munged", "sbatch", "runuser")
        if not shutil.which(t, path=f"{os.environ['PATH']}:/usr/sbin")
    ]
    if os.geteuid() != 0 or missing:
        pytest.skip(f"needs root and Slurm (Debian: slurm-wlm munge); not here: {missing or 'root'}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    env = {
        **{k: v for k, v in launch.ENV.items() if not k.startswith(("SLURM_", "RDZV_"))},
        "SLURM_CONF": str(folder / "slurm.conf"),
        "NPROC_PER_NODE": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin",
    }
    (folder / "state").mkdir()
    (folder / "munge").mkdir()
    folder.chmod(0o755)
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o400)
    for name in ("key", "munge"):
        shutil.chown(folder / name, "munge", "munge")
    (folder / "slurm.conf").write_text(
        CONF.format(
            folder=folder,
            host=socket.gethostname().split(".")[0],
            ports=[launch.free_port() for _ in range(3)],
            cpus=os.cpu_count(),
            track=track,
        )
    )
    daemons = []
    try:
        munge = folder / "munge"
        for command in (
            [
                "runuser",
                "-u",
                "munge",
                "--",
                "munged",
                "-F",
                "-f",
                f"--key-file={folder / 'key'}",
                f"--socket={munge}/socket",
                f"--pid-file={munge}/pid",
                f"--log-file={munge}/log",
                f"--seed-file={munge}/seed",
            ],
            ["slurmctld", "-D"],
            ["slurmd", "-D", "-N", "n0"],
            ["slurmd", "-D", "-N", "n1"],
        ):
            daemons.append(
                subprocess.Popen(
                    command, env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
            time.sleep(0.5)
        wait(lambda: output(env, "sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", 30, "two idle nodes")
        if track == "cgroup" and "here" not in output(env, "timeout", "20", "srun", "-N1", "echo", "here"):
            said = (folder / "slurmd-n0.log").read_text().splitlines()[-2:]
            pytest.skip(f"Slurm starts no step here with proctrack/cgroup: {said}")
        yield env
    finally:
        subprocess.run(["scancel", "--user", "root"], env=env, capture_output=True, timeout=20)
        deadline = time.monotonic() + 20
        while output(env, "squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(0.5)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                launch.kill_group(daemon)
        shutil.rmtree(folder, ignore_errors=True)


def output(env: dict, *command) -> str:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30).stdout


def wait(condition, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"no {what} after {seconds} s"
        time.sleep(0.3)
