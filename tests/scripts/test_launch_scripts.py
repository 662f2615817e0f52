"""The scripts in launch/: what they would run, what they refuse, and real runs of two ranks on this CPU."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import launch

SCRIPTS = launch.ROOT / "launch"
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
CLEAN = {
    k: v
    for k, v in launch.ENV.items()
    if k not in ("RANK", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "EXPORT", "DS_ENV_FILE")
    and not k.startswith(("RDZV_", "SLURM_"))
} | {"PATH": PATH}


def script(name: str, *arguments, **env) -> subprocess.CompletedProcess:
    """A script that ends at once (a dry run, a refusal)."""
    return subprocess.run(
        ["bash", SCRIPTS / name, *map(str, arguments)],
        env=CLEAN | env,
        cwd=launch.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def dry(name: str, *arguments, **env) -> list[str]:
    done = script(name, "--dry-run", *arguments, **env)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout.splitlines()[-1])


def test_dry_run_local():
    assert dry("local.sh", "-n", 2, "train", "my.yaml", "run.dir=a b") == [
        "deepspeed",
        "--hostfile",
        "/dev/null",
        "--master_port",
        "29500",
        "--num_gpus",
        "2",
        "--module",
        "fastft",
        "train",
        "my.yaml",
        "run.dir=a b",
    ]
    assert dry("local.sh", "resume", "runs/my", MASTER_PORT="1234")[3:] == [
        "--master_port",
        "1234",
        "--module",
        "fastft",
        "resume",
        "runs/my",
    ]


def test_dry_run_torchrun():
    common = ["--max-restarts", "0", "--rdzv-backend"]
    assert dry("torchrun.sh", "train", "my.yaml", NPROC_PER_NODE="2") == [
        "torchrun",
        "--nnodes",
        "1",
        "--node-rank",
        "0",
        "--nproc-per-node",
        "2",
        *common,
        "static",
        "--rdzv-endpoint",
        "127.0.0.1:29400",
        "-m",
        "fastft",
        "train",
        "my.yaml",
    ]
    env = {
        "NNODES": "2",
        "NODE_RANK": "1",
        "RDZV_ENDPOINT": "node-0:29400",
        "NPROC_PER_NODE": "8",
        "RDZV_BACKEND": "c10d",
        "RDZV_ID": "x",
    }
    assert dry("torchrun.sh", "resume", "r", **env) == [
        "torchrun",
        "--nnodes",
        "2",
        "--node-rank",
        "1",
        "--nproc-per-node",
        "8",
        *common,
        "c10d",
        "--rdzv-endpoint",
        "node-0:29400",
        "--rdzv-id",
        "x",
        "--rdzv-conf",
        "is_host=0",
        "-m",
        "fastft",
        "resume",
        "r",
    ]


def test_dry_run_multinode(tmp_path):
    """The address is always passed; variables are in DS_ENV_FILE (pdsh) or in the command (ssh), secrets in neither."""
    hostfile = tmp_path / "hosts"
    hostfile.write_text("# nodes\n10.77.0.1 slots=2\n\n10.77.0.2 slots=2\n")
    env = {
        "GLOO_SOCKET_IFNAME": "eth0",
        "HF_TOKEN": "hf_abc",
        "MLFLOW_TRACKING_TOKEN": "mlf_abc",
        "EXPORT": "MY_SETTING",
        "MY_SETTING": "a b",
    }
    deepspeed = ["deepspeed", "--hostfile", str(hostfile), "--master_addr", "10.77.0.1", "--master_port", "29500"]
    done = script("multinode.sh", "-H", hostfile, "--launcher", "pdsh", "--dry-run", "train", "my.yaml", **env)
    *variables, command = done.stdout.splitlines()
    assert shlex.split(command) == [
        *deepspeed,
        "--force_multi",
        "--launcher",
        "pdsh",
        "--module",
        "fastft",
        "train",
        "my.yaml",
    ]
    assert all(line.startswith("# DS_ENV_FILE: ") and "=" in line for line in variables)
    assert {
        "# DS_ENV_FILE: GLOO_SOCKET_IFNAME=eth0",
        "# DS_ENV_FILE: MY_SETTING=a b",
        f"# DS_ENV_FILE: PATH={PATH}",
    } <= set(variables)
    assert "_abc" not in done.stdout and "MLFLOW_TRACKING_TOKEN stays here" in done.stderr
    done = script(
        "multinode.sh",
        "-H",
        hostfile,
        "--launcher",
        "ssh",
        "--dry-run",
        "train",
        "my.yaml",
        MASTER_ADDR="10.77.0.9",
        **env,
    )
    assert len(done.stdout.splitlines()) == 2 and "_abc" not in done.stdout
    for i, line in enumerate(done.stdout.splitlines()):
        *ssh, remote = shlex.split(line)
        assert ssh == ["ssh", "-o", "BatchMode=yes", f"10.77.0.{i + 1}"] and "export MY_SETTING=a\\ b;" in remote
        deepspeed[4] = "10.77.0.9"
        assert shlex.split(remote.split(" && exec ")[1]) == [
            "env",
            "-u",
            "RANK",
            "FASTFT_LAUNCH_ID=ID",
            *deepspeed,
            "--no_ssh",
            "--node_rank",
            str(i),
            "--module",
            "fastft",
            "train",
            "my.yaml",
        ]


def test_dry_run_slurm(lm_config, tmp_path):
    """A fresh run trains; one that has a checkpoint is resumed."""
    config, run = launch.write_config(tmp_path / "c.yaml", lm_config), Path(lm_config["run"]["dir"])
    step = ["NNODES=2", "RDZV_ENDPOINT=NODE:20000", "srun", "--kill-on-bad-exit=0", str(SCRIPTS / "torchrun.sh")]
    assert dry("slurm.sbatch", config, "train.steps=9") == [*step, "train", str(config), "train.steps=9"]
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "LATEST").write_text('{"step": 1}')
    assert dry("slurm.sbatch", config) == [*step, "resume", str(run)]


@pytest.mark.parametrize(
    "name, arguments, env, message",
    [
        ("local.sh", ["-n", "two", "train", "c"], {}, "-n two: not a number of ranks"),
        ("local.sh", [], {}, "nothing to run"),
        ("local.sh", ["--gpus", "2"], {}, "unknown option --gpus"),
        ("torchrun.sh", ["train", "c"], {"NNODES": "2"}, "NODE_RANK is not set"),
        ("torchrun.sh", ["train", "c"], {"NNODES": "2", "NODE_RANK": "0"}, "RDZV_ENDPOINT is not set"),
        (
            "torchrun.sh",
            ["train", "c"],
            {"NNODES": "2", "NODE_RANK": "2", "RDZV_ENDPOINT": "a:1"},
            "it goes from 0 to 1",
        ),
        ("torchrun.sh", ["train", "c"], {"NNODES": "2", "NODE_RANK": "1", "RDZV_ENDPOINT": "a"}, "is not HOST:PORT"),
        ("multinode.sh", ["train", "c"], {}, "no hostfile"),
        ("multinode.sh", ["-H", "nowhere", "train", "c"], {}, "no such file"),
        ("slurm.sbatch", [], {}, "no configuration"),
        ("slurm.sbatch", ["README.md"], {}, "not inside a Slurm job"),
    ],
)
def test_bad_input_is_one_line(name, arguments, env, message):
    done = script(name, *arguments, **env)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize(
    "text, env, message",
    [
        ("# nothing\n\n", {}, "names no host"),
        ("a slots=1\nb\n", {}, "line 2: 'b' is not 'HOST slots=N'"),
        ("a slots=1\na slots=1\n", {}, "appears twice"),
        ("localhost slots=1\nb slots=1\n", {}, "loopback address"),
        ("no-such-host.invalid slots=1\n", {}, "does not resolve"),
        ("10.0.0.1 slots=1\n", {"EXPORT": "HF_TOKEN", "HF_TOKEN": "x"}, "HF_TOKEN looks like a secret"),
        ("10.0.0.1 slots=1\n", {"EXPORT": "A", "A": "b\nc"}, "A cannot travel"),
    ],
)
def test_bad_hostfile_is_one_line(tmp_path, text, env, message):
    (tmp_path / "hosts").write_text(text)
    done = script("multinode.sh", "-H", tmp_path / "hosts", "train", "c", **env)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["local.sh", "torchrun.sh", "multinode.sh", "slurm.sbatch"])
def test_help(name):
    done = script(name, "-h")
    assert done.returncode == 0 and f"launch/{name}" in done.stdout


def test_shellcheck():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    files = [*SCRIPTS.glob("*.sh"), SCRIPTS / "slurm.sbatch"]
    done = subprocess.run(["shellcheck", "-x", "-P", SCRIPTS, *files], cwd=launch.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def started(name: str, arguments: list) -> subprocess.Popen:
    env = {
        "PATH": PATH,
        "NPROC_PER_NODE": "2",
        "MASTER_PORT": str(launch.free_port()),
        "RDZV_ENDPOINT": f"127.0.0.1:{launch.free_port()}",
    }
    return launch.start([SCRIPTS / name, *(["-n", "2"] if name == "local.sh" else []), *arguments], env)


def left(run: Path) -> list[str]:
    """Processes that still hold the run's folder in their command."""
    found = subprocess.run(
        ["grep", "-la", str(run), *Path("/proc").glob("[0-9]*/cmdline")], capture_output=True, text=True
    ).stdout.split()
    return [name for name in found if Path(name).exists()]  # without the grep itself


def losses(run: Path) -> list[tuple]:
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.long  # beside test_every_launcher_gives_the_same_run over two hosts
def test_two_ranks_by_each_launcher_learn_the_same(lm_config, tmp_path):
    config = launch.write_config(tmp_path / "c.yaml", lm_config | {"train": {"steps": 2, "log_every": 1}})
    curves = []
    for name in ("local.sh", "torchrun.sh"):
        run = tmp_path / name
        process = started(name, ["train", config, f"run.dir={run}"])
        output = launch.finish(process, 60)
        assert process.returncode == 0, output[-4000:]
        curves.append(losses(run))
    assert len(curves[0]) == 2 and curves[0] == curves[1]
    refused = started("torchrun.sh", ["train", config, f"run.dir={run}"])
    assert "already holds a run" in launch.finish(refused, 60) and refused.returncode == 1


@pytest.mark.slow
@pytest.mark.parametrize("name, signum", [("local.sh", signal.SIGTERM), ("torchrun.sh", signal.SIGUSR1)])
def test_a_stop_saves_and_ends_with_143(lm_config, tmp_path, name, signum):
    config, run = (
        launch.write_config(tmp_path / "c.yaml", lm_config | {"train": {"steps": 4000, "log_every": 1}}),
        tmp_path / "stopped",
    )
    process = started(name, ["train", config, f"run.dir={run}"])
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None and not ((run / "metrics.jsonl").is_file() and losses(run)):
        time.sleep(0.2)
    process.send_signal(signum)
    output = launch.finish(process, 60)
    assert process.returncode == 143 and "saved at step" in output, output[-4000:]
    assert (run / "checkpoints" / "LATEST").is_file() and not left(run)
