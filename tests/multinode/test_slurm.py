"""launch/slurm.sbatch under a real Slurm of two nodes (two slurmd on this machine),
built in a temporary folder and taken down again.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
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


@pytest.fixture(scope="module", params=["pgid", pytest.param("cgroup", marks=pytest.mark.long)])
def slurm(request):
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
            track=request.param,
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
        if request.param == "cgroup" and "here" not in output(env, "timeout", "20", "srun", "-N1", "echo", "here"):
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


def submit(env: dict, log: Path, *arguments) -> str:
    """sbatch; the job's number."""
    done = subprocess.run(
        [
            "sbatch",
            "--parsable",
            "-o",
            log,
            "--gpus-per-node=0",
            "--cpus-per-task=1",
            "--mem=0",
            launch.ROOT / "launch" / "slurm.sbatch",
            *arguments,
        ],
        env=env,
        cwd=launch.ROOT,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def losses(run: Path) -> list[tuple]:
    path = run / "metrics.jsonl"
    records = map(json.loads, path.read_text().splitlines()) if path.is_file() else []
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]


@pytest.mark.slow
def test_two_nodes_train_then_a_warned_job_requeues_itself_and_goes_on(slurm, lm_config, tmp_path):
    """The losses are those of two ranks without Slurm, also when SIGUSR1 (the warning before the time limit) came in
    between.
    """
    config, log, steps = launch.write_config(tmp_path / "c.yaml", lm_config), tmp_path / "log", 200
    job = submit(slurm, log, config, f"run.dir={tmp_path / 'slurm'}", f"train.steps={steps}")
    try:
        wait(lambda: losses(tmp_path / "slurm"), 60, "first step")
        output(slurm, "scancel", "--batch", "--signal=USR1", job)
        wait(lambda: "is queued again" in log.read_text(), 40, "requeue")
        wait(lambda: not output(slurm, "squeue", "-h", "-j", job).strip(), 120, "end of the job")
    except AssertionError as e:
        raise AssertionError(f"{e}\n{log.read_text()[-4000:] if log.is_file() else 'no log'}") from None
    assert "JobState=COMPLETED" in output(slurm, "scontrol", "show", "job", job), log.read_text()[-4000:]
    launch.ranks(2, ["-m", "fastft", "train", config, f"run.dir={tmp_path / 'plain'}", f"train.steps={steps}"])
    assert len(losses(tmp_path / "plain")) == steps and losses(tmp_path / "slurm") == losses(tmp_path / "plain")


@pytest.mark.slow
def test_what_slurm_kills_leaves_nothing(slurm, lm_config, tmp_path):
    """A cancelled job, one rank of which hangs and cannot save: Slurm kills what it knows after KillWait. The ranks,
    which it does not know where it goes by process group, end too.
    """
    run = tmp_path / "killed"
    lm_config["train"]["log_every"] = 10**6  # nothing is written, so that no broken pipe ends them
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    job = submit(slurm, tmp_path / "log", path, f"run.dir={run}", "train.steps=1000000")
    wait(lambda: losses(run), 60, "first step")
    ranks = {pid: line for pid, line in processes_of(run).items() if "torchrun" not in line and "srun" not in line}
    assert len(ranks) >= 2, ranks
    os.kill(min(ranks), signal.SIGSTOP)
    output(slurm, "scancel", job)
    wait(lambda: not processes_of(run), 30, "end of the ranks")


def processes_of(run: Path) -> dict[int, str]:
    """This machine's processes that name a run: process id -> command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if str(run) in line and "python" in line:
                found[int(path.parent.name)] = line
    return found
