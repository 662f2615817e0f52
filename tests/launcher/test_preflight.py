"""What preflight finds, from facts as hosts give them; the
conversation itself is tested over real hosts in tests/multinode.
"""

import copy
import sys
from pathlib import Path

import pytest

import launch
from fastft.launch import launcher, preflight, probe
from fastft.launch.hostfile import Host

PLAN = launcher.Plan([], [Host("a", 2), Host("b", 2)], Path("/run"), "10.0.0.1", 29500)


@pytest.fixture
def good(tmp_path) -> list[dict]:
    (tmp_path / "marker").write_text("1")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "part.txt").write_text("12345")
    facts = probe.facts(str(tmp_path), launch.free_port(), "marker", [str(tmp_path / "data"), str(tmp_path / "marker")])
    assert list(facts["inputs"].values()) == [5, 1]
    assert facts["disk_write"] > 0 and facts["port_free"] and facts["packages"]["torch"]
    found = [
        {**copy.deepcopy(facts), "name": name, "skew": 0.01, "to": other, "bandwidth": 1e9}
        for name, other in (("a", "b"), ("b", "a"))
    ]
    assert preflight.problems(found, 0, PLAN) == []
    return found


@pytest.mark.parametrize(
    "change, message",
    [
        ({"python": "3.10.1"}, "b: python 3.10.1, a has"),
        ({"code": "0000"}, "b: code 0000, a has"),
        ({"gpus": ["H100, 550"]}, "b: gpus"),
        ({"packages": {"torch": "2.0"}}, "b: torch 2.0, a has"),
        ({"skew": 3.0}, "b: its clock is +3.0 s off"),
        ({"shared": False}, "b: sees another /run"),
        ({"disk_error": "/run: No space left on device"}, "b: /run: No space"),
        ({"disk_free": 10}, "b: 0.0 GB free in /run, the checkpoints need 5.0 GB"),
        ({"bandwidth": 1e8}, "b: 100 MB/s to a, the median is"),
        ({"bandwidth": None}, "b: cannot send to a"),
        ({"error": "Connection refused"}, "b: cannot be asked: Connection"),
        ({"inputs": {"data": None, "marker": 1}}, "/data is not there"),
        ({"inputs": {"data": 0, "marker": 1}}, "/data is empty"),
        ({"inputs": {"data": 4, "marker": 1}}, "/data has 4 bytes, on a 5"),
    ],
)
def test_every_fault_names_its_host(good, change, message):
    if "packages" in change:
        change = {"packages": {**good[1]["packages"], **change["packages"]}}
    if "inputs" in change:
        change = {"inputs": dict(zip(good[1]["inputs"], change["inputs"].values(), strict=True))}
    good[1].update(change)
    assert any(message in problem for problem in preflight.problems(good, 5_000_000_000, PLAN)), preflight.problems(
        good, 5_000_000_000, PLAN
    )


def test_gpu_hosts(good):
    for facts in good:
        facts.update(gpus=["H100, 550"], shm=1000)
    wrong = preflight.problems(good, 0, PLAN)
    assert "a: 2 slots for 1 GPUs" in wrong and any("/dev/shm" in w for w in wrong)
    good[0]["port_free"] = False
    assert "a: port 29500 is taken" in preflight.problems(good, 0, PLAN)


def test_this_machine(lm_config, tmp_path):
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    _, output = launch.fastft("preflight", path, "--master-port", str(launch.free_port()))
    assert "1 host: nothing is wrong." in output
    code, output = launch.fastft("preflight", path, "run.dir=/proc/nothing", check=False)
    assert code == 1 and "/proc" in output and "Traceback" not in output


def test_a_host_with_an_older_fastft_is_named(tmp_path, monkeypatch):
    """It answers, but not all that is asked of it today."""
    old = tmp_path / "old"
    old.write_text(
        f"#!{sys.executable}\nimport sys\nfor line in sys.stdin:\n"
        '    print(\'{"host": "b", "python": "3.11"}\', flush=True)\n'
    )
    old.chmod(0o755)
    plan = launcher.Plan([], [Host("localhost", 1), Host("b", 1)], tmp_path / "run", "127.0.0.1", launch.free_port())
    real = preflight.remote_command
    monkeypatch.setattr(
        preflight,
        "remote_command",
        lambda plan, host, module: [str(old)] if host.name == "b" else real(plan, host, module),
    )
    found, wrong = preflight.preflight(plan, 0, [])
    assert (
        len(wrong) == 1
        and wrong[0].startswith("b: cannot be asked: its fastft is another one")
        and "inputs" in wrong[0]
    )
    assert len(preflight.describe(found)) == 2


def test_a_host_that_hangs_is_named(tmp_path, monkeypatch):
    """As behind a driver or a disk that never answers: a process that reads the question and says nothing."""
    silent = tmp_path / "silent"
    silent.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(600)\n")
    silent.chmod(0o755)
    monkeypatch.setattr(preflight, "LIMIT", 1.0)
    plan = launcher.Plan(
        [], [Host("localhost", 1)], tmp_path / "run", "127.0.0.1", launch.free_port(), python=str(silent)
    )
    _, wrong = preflight.preflight(plan, 0, [])
    assert wrong == ["localhost: cannot be asked: no answer to 'facts' within 1 s: a hanging driver or disk?"]


def test_inputs_that_cannot_be_read(tmp_path):
    (tmp_path / "folder").mkdir()
    assert probe._size(tmp_path / "folder") == 0 and probe._size(tmp_path / "nowhere") is None
    (tmp_path / "folder" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder" / "file").write_text("123")
    assert probe._size(tmp_path / "folder") == 3


def test_a_shell_that_prints_and_one_that_is_gone(tmp_path, monkeypatch):
    """Lines that are no answer are passed over, JSON or not; a host
    whose process ends before it is asked is named with its last words.
    """
    real = [launch.sys.executable, "-m", "fastft.launch.probe"]
    chatty = ["sh", "-c", f"echo Welcome; echo 12; cd {launch.ROOT}; exec {' '.join(real)}"]
    plan = launcher.Plan([], [Host("localhost", 1)], tmp_path / "run", "127.0.0.1", launch.free_port())
    monkeypatch.setattr(preflight, "remote_command", lambda *_: chatty)
    assert preflight.preflight(plan, 0, [])[1] == []
    monkeypatch.setattr(preflight, "remote_command", lambda *_: ["sh", "-c", "echo boom >&2; exit 3"])
    monkeypatch.setattr(
        preflight,
        "_all",
        lambda probes, _all=preflight._all, **order: probes[0].process.wait() and _all(probes, **order),
    )
    assert preflight.preflight(plan, 0, [])[1] == ["localhost: cannot be asked: boom"]
