"""`fastft launch`: host files, plans, and real ranks that end together."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

import launch
from fastft.errors import UserError
from fastft.launch import hostfile, launcher
from fastft.launch.hostfile import Host


def test_host_file(tmp_path):
    (tmp_path / "hosts").write_text(
        "# a comment\nnode1 slots=8\n\nnode-2.cluster  slots = 4 # the small one\n10.0.0.3 slots=1\n"
    )
    assert hostfile.read(tmp_path / "hosts") == [Host("node1", 8), Host("node-2.cluster", 4), Host("10.0.0.3", 1)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "names no host"),
        ("node1\n", ":1: expected `name slots=N`"),
        ("a slots=0\n", ":1: expected"),
        ("a slots=1\nb slots=x\n", ":2: expected"),
        ("a slots=1\na slots=2\n", ":2: a appears twice"),
        ("-oProxyCommand=x slots=1\n", "expected|no host name"),
    ],
)
def test_host_files_that_are_wrong(tmp_path, text, message):
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        hostfile.read(tmp_path / "hosts")


def test_plans(tmp_path):
    with pytest.raises(UserError, match="no such host file"):
        hostfile.read(tmp_path / "none")
    with pytest.raises(UserError, match=r"host no-such-host.invalid"):
        launcher.plan(["train", "c.yaml"], [Host("no-such-host.invalid", 1)], tmp_path)
    with pytest.raises(UserError, match="cannot reach"):
        launcher.plan(["train", "c.yaml"], [Host("localhost", 1), Host("127.0.0.2", 1)], tmp_path)
    plan = launcher.plan(
        ["train", "a b.yaml"], [Host("localhost", 2), Host("192.0.2.7", 3)], tmp_path, master_addr="192.0.2.1"
    )
    here, there = launcher.describe(plan)
    assert here.startswith(f"localhost: {sys.executable} -m fastft.launch.agent") and "ranks 0 to 1" in here
    assert "ssh" in there and "192.0.2.7" in there and "ranks 2 to 4: train 'a b.yaml'" in there


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["chat", "x"], "starts `train CONFIG`"),
        (["train"], "starts `train CONFIG`"),
        (["train", "none.yaml"], "no such configuration"),
        (["--hostfile", "h", "--nproc", "2", "train", "c"], "exclude each other"),
        (["--hostfile", "none", "train", "c"], "no such host file"),
    ],
)
def test_what_cannot_be_launched(arguments, message):
    code, output = launch.fastft("launch", *arguments, check=False)
    assert code == 1 and message in output and "Traceback" not in output


def test_ranks_run_as_under_any_launcher(lm_config, tmp_path):
    """Two ranks, ZeRO-2: the losses of the same ranks started by hand; a log per rank;
    rank 0's lines are passed on; a mistake is not tried again.
    """
    from fastft import track

    lm_config["train"] = {"steps": 3, "log_every": 1}
    lm_config["parallel"] = {"zero": 2}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    _, output = launch.fastft("launch", "--nproc", "2", "train", path, f"run.dir={tmp_path}/one")
    launch.ranks(2, ["-m", "fastft", "train", path, f"run.dir={tmp_path}/two"])
    one, two = ([r["loss"] for r in track.read(tmp_path / name) if r["kind"] == "train"] for name in ("one", "two"))
    assert one == two and len(one) == 3 and "step 3/3" in output
    assert sorted(p.name for p in (tmp_path / "one" / "logs" / "attempt-1").glob("*.log")) == [
        "rank-0.log",
        "rank-1.log",
    ]
    code, output = launch.fastft("launch", "--nproc", "2", "train", path, f"run.dir={tmp_path}/one", check=False)
    assert code == 1 and "already holds a run" in output and "restart" not in output
    assert sorted(p.name for p in (tmp_path / "one" / "logs").glob("attempt-*")) == ["attempt-1", "attempt-2"], (
        "older logs stay, and a mistake is tried once"
    )


def test_an_agent_that_is_not_heard_kills_its_ranks(lm_config, tmp_path):
    """The launcher's end of the pipe closes: as when it, or the ssh connection, is gone."""
    lm_config["train"] = {"steps": 4000}
    spec = {
        "arguments": ["train", str(launch.write_config(tmp_path / "c.yaml", lm_config))],
        "node": 0,
        "first_rank": 0,
        "ranks": 2,
        "world": 2,
        "master_addr": "127.0.0.1",
        "master_port": launch.free_port(),
        "env": {},
        "logs": str(tmp_path / "logs"),
        "watchdog": 0.0,
    }
    agent = launch.start([sys.executable, "-m", "fastft.launch.agent"], stdin=launch.subprocess.PIPE)
    agent.stdin.write(json.dumps(spec) + "\n")
    agent.stdin.flush()
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not metrics.exists():
        assert time.monotonic() < deadline and agent.poll() is None
        time.sleep(0.05)
    agent.stdin.close()
    agent.stdin = None
    launch.finish(agent, 10)
    assert agent.returncode == 1
    assert "the launcher is gone" in (tmp_path / "logs" / "rank-1.log").read_text()
    assert not [p for p in Path("/proc").glob("[0-9]*") if str(tmp_path).encode() in _command_line(p)]


def test_a_killed_agent_takes_its_ranks_with_it(lm_config, tmp_path):
    """SIGKILL of the agent itself: the kernel ends the ranks (PR_SET_PDEATHSIG); the launcher says so and resumes."""
    lm_config["train"] = {"steps": 60, "log_every": 1}
    lm_config["checkpoint"] = {"every": 10}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    process = launch.start_python(["-m", "fastft", "launch", "--nproc", "2", "--backoff", "0", "train", path], {})
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    agent = next(int(c) for c in children if b"fastft.launch.agent" in _command_line(Path("/proc") / c))
    os.kill(agent, signal.SIGKILL)
    output = launch.finish(process, 120)
    assert process.returncode == 0 and "its agent ended (exit code -9)" in output and "restart 1 of 3" in output, (
        output[-3000:]
    )


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock" and "logs" not in p.parts
    }


def test_a_restart_takes_nobody_elses_run(lm_config, tmp_path):
    """A rank that dies before it has looked at run.dir, which holds another run:
    the next try is the same command again, and is refused.
    """
    lm_config["train"] = {"steps": 2}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    launch.fastft("train", path)
    before = files(tmp_path / "run")
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import os, signal\n"
        "if 'RANK' in os.environ and not os.path.exists(os.environ['MARK']):\n"
        "    open(os.environ['MARK'], 'w'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    env = {"PYTHONPATH": f"{tmp_path}/hook:{launch.ENV['PYTHONPATH']}", "MARK": str(tmp_path / "mark")}
    code, output = launch.fastft(
        "launch", "--nproc", "1", "--backoff", "0", "train", path, "train.steps=5", env=env, check=False
    )
    assert code == 1 and "restart 1 of 3 in 0 s, from the start" in output and "already holds a run" in output, output
    assert files(tmp_path / "run") == before


def started(path: Path, run: Path, *options, env: dict | None = None) -> "launch.subprocess.Popen":
    process = launch.start_python(
        ["-m", "fastft", "launch", "--nproc", "2", "--max-restarts", "0", *options, "train", path], env or {}
    )
    deadline = time.monotonic() + 90
    while not ((run / "metrics.jsonl").exists() and '"kind": "train"' in (run / "metrics.jsonl").read_text()):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    return process


def test_sigterm_to_every_process_of_a_job_saves(lm_config, tmp_path):
    lm_config["train"] = {"steps": 100000, "log_every": 1}
    process = started(launch.write_config(tmp_path / "c.yaml", lm_config), tmp_path / "run")
    for folder in Path("/proc").glob("[0-9]*"):
        if str(tmp_path).encode() in _command_line(folder) or b"fastft.launch.agent" in _command_line(folder):
            os.kill(int(folder.name), signal.SIGTERM)
    output = launch.finish(process, 60)
    assert process.returncode == 143 and "saved at step" in output, output[-2000:]
    assert list((tmp_path / "run" / "checkpoints").glob("step-*/MANIFEST.json"))


@pytest.mark.parametrize("background", [True, pytest.param(False, marks=pytest.mark.long)])
def test_a_rank_that_cannot_write_ends_all_with_its_reason(lm_config, tmp_path, background):
    """Rank 1's disk fails, at a save that the run waits for and at one that it does not."""
    lm_config["train"] = {"steps": 100000, "log_every": 1}
    lm_config["checkpoint"] = {"every": 40, "background": background}
    process = started(launch.write_config(tmp_path / "c.yaml", lm_config), tmp_path / "run")
    while process.poll() is None:
        for scratch in (tmp_path / "run" / "checkpoints").glob("step-*.tmp"):
            with suppress(OSError):
                (scratch / "rng-1.safetensors").mkdir()
        time.sleep(0.001)
    output = launch.finish(process, 10)
    assert process.returncode == 1 and "rank 1:" in output and "rng-1.safetensors" in output, output[-2000:]


def test_what_ssh_prints_in_another_encoding_hangs_nothing(lm_config, tmp_path):
    lm_config["train"] = {"steps": 1}
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text("#!/bin/bash\nprintf 'Gr\\xfc\\xdfe\\n'\nexec bash -c \"${@: -1}\"\n")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    (tmp_path / "hosts").write_text("192.0.2.9 slots=1\n")
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    launch.fastft(
        "launch",
        "--hostfile",
        tmp_path / "hosts",
        "--master-addr",
        "127.0.0.1",
        "train",
        path,
        env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}"},
    )


def test_a_second_process_is_refused(lm_config, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        code, output = launch.fastft("train", launch.write_config(tmp_path / "c.yaml", lm_config), check=False)
    assert code == 1 and "another process is training in" in output and "Traceback" not in output


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize(
    ("cause", "effect", "code"),
    [
        ({"code": -9}, {"code": 1}, 137),  # a rank is killed, its peer fails for want of it
        ({"code": -11}, {"code": 1}, 139),
        ({"code": 2, "mistake": "no such file"}, {"code": -9}, 2),
        ({"code": 2, "mistake": "no such file"}, {"code": 1}, 2),
    ],
)
def test_the_cause_decides_whichever_rank_is_seen_first(capsys, order, cause, effect, code):
    attempt = launcher._Attempt(launcher.plan(["train"], [Host("localhost", 2)], Path("/nowhere")), 1, True, None)
    attempt.nodes, node = [], launcher._Node(Host("localhost", 2), None)
    ended = [
        {"event": "exit", "rank": rank, "killed": False, "mistake": None, "tail": "", **event}
        for rank, event in enumerate((cause, effect))
    ]
    for i in order:
        attempt._took(node, ended[i])
    assert attempt.outcome.code == code
    assert "rank 0 on localhost" in capsys.readouterr().err


def test_what_follows_from_a_failure_does_not_decide(capsys):
    """Ranks that the agent killed, or that NCCL's watchdog aborted, after one has failed."""
    attempt = launcher._Attempt(launcher.plan(["train"], [Host("localhost", 3)], Path("/nowhere")), 1, True, None)
    attempt.nodes, node = [], launcher._Node(Host("localhost", 3), None)
    for rank, (code, killed) in enumerate([(1, False), (-9, True), (-6, False)]):
        attempt._took(
            node, {"event": "exit", "rank": rank, "code": code, "killed": killed, "mistake": None, "tail": ""}
        )
    assert attempt.outcome.code == 1
    assert "rank 1" not in capsys.readouterr().err
