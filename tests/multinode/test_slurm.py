"""launch/slurm.sbatch under a real Slurm of two nodes (slurm.py)."""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
import slurm as real
from slurm import output, wait

import launch


@pytest.fixture(scope="module", params=["pgid", pytest.param("cgroup", marks=pytest.mark.long)])
def slurm(request):
    with real.cluster(request.param) as env:
        yield env


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
