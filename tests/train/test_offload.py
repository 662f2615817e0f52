"""State in the host's memory: the same run, bit for bit."""

import copy
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from train.test_reshard import same_state
from train.test_resume import RUNS, curve

import launch
from fastft import config as configuration
from fastft import mapped
from fastft.errors import UserError
from fastft.optim import FusedAdamW
from fastft.zero import on_disk

CASES = [(1, "bf16", "optimizer"), (2, "fp32", "optimizer"), (3, "bf16", "optimizer"), (3, "fp32", "parameters")]
CASES += [(2, "bf16", "optimizer"), (3, "bf16", "parameters")]
DISK = [(1, "bf16", "optimizer"), (3, "bf16", "parameters")]  # in files, too


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_offload_changes_no_bit(lm_config, tmp_path, world):
    """Losses, norms, checkpoints; several micro-steps, clipping that bites at every step of this model."""
    paths, runs = [], {}
    (tmp_path / "files").mkdir()
    for zero, dtype, offload in CASES:
        for where in (None, offload, "disk") if (zero, dtype, offload) in DISK else (None, offload):
            config = copy.deepcopy(lm_config)
            config["data"]["cache"] = str(tmp_path / "prepared")
            config["train"] = {"steps": 4, "log_every": 1}
            config["batch"] = {"size": 8, "micro": 2}
            config["optim"] |= {"grad_clip": 0.5, "lr": 1e-3}
            config["model"]["dtype"] = dtype
            config["checkpoint"] = {"every": 2, "keep": 2}
            config["parallel"] = {"zero": zero, "offload": offload if where == "disk" else where}
            if where == "disk":
                config["parallel"]["offload_dir"] = str(tmp_path / "files")
            name = f"{zero}-{dtype}-{where}"
            config["run"]["dir"] = str(tmp_path / name)
            runs[zero, dtype, where] = tmp_path / name
            paths.append(launch.write_config(tmp_path / f"{name}.yaml", config))
    launch.ranks(world, [RUNS, "train", *dict.fromkeys(paths)])
    for zero, dtype, offload in CASES:
        first = runs[zero, dtype, None]
        for second in (run for case, run in runs.items() if case[:2] == (zero, dtype) and case[2] is not None):
            assert curve(first) == curve(second), (zero, dtype, offload)
            same_state(first / "checkpoints", second / "checkpoints", world, zero, step=4)
    # A checkpoint of the one is one of the other.
    whole = runs[3, "bf16", "parameters"]
    for name, run in (("there", whole), ("back", runs[3, "bf16", None]), ("disk", runs[3, "bf16", "disk"])):
        resumed = tmp_path / name
        shutil.copytree(run, resumed, ignore=shutil.ignore_patterns("step-4", "model", "metrics.jsonl"))
        other = [f"parallel.offload={'null' if name == 'there' else 'parameters'}"]
        launch.ranks(world, ["-m", "fastft", "resume", resumed, *(other if name != "disk" else [])])
        same_state(whole / "checkpoints", resumed / "checkpoints", world, 3, step=4)
    assert list((tmp_path / "files").iterdir()) == []


def _disk_of(megabytes: float) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(megabytes * 1e6), resource.RLIM_INFINITY))


def test_a_disk_without_room_is_told_before_the_first_step(lm_config, tmp_path):
    (tmp_path / "disk").mkdir()
    lm_config["parallel"] = {"zero": 1, "offload": "optimizer", "offload_dir": str(tmp_path / "disk")}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    started = subprocess.run(
        [sys.executable, "-m", "fastft", "train", path],
        env=launch.ENV,
        preexec_fn=partial(_disk_of, 0.3),
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = " ".join((started.stdout + started.stderr).split())
    assert started.returncode == 1 and f"{tmp_path / 'disk'}: File too large: no room for" in said, said
    assert "parallel.offload_dir" in said and "Traceback" not in said and list((tmp_path / "disk").iterdir()) == []


def test_what_lies_in_files(tmp_path):
    """Masters and moments, also of another dtype, and what is put beside them later; a small tensor stays."""
    flat = torch.nn.Parameter(torch.randn(5000))
    with torch.no_grad():
        expected = flat.clone()
        flat.data = mapped.moved(flat.data, tmp_path)
    assert mapped.is_mapped(flat) and mapped.is_mapped(flat[10:20]) and torch.equal(flat, expected)
    for state_dtype in ("fp32", "bf16"):
        optimizer = FusedAdamW([flat], lr=0.1, state_dtype=state_dtype)
        flat.grad = torch.ones(5000)
        optimizer.step()
        state = optimizer.state[flat]
        assert {name for name, value in state.items() if mapped.is_mapped(value)} == {"exp_avg", "exp_avg_sq"}
        state["exp_avg"] = state["exp_avg"].clone()
        on_disk.state_onto_disk(optimizer)
        assert mapped.is_mapped(state["exp_avg"]) and not mapped.is_mapped(state["step"])
    assert list(tmp_path.iterdir()) == [] and not mapped.is_mapped(torch.from_file(__file__, size=8, dtype=torch.uint8))


@pytest.mark.parametrize(
    "parallel, said",
    [
        ({"zero": 0, "offload": "optimizer"}, "parallel.offload: optimizer needs parallel.zero: 1 or more"),
        ({"zero": 2, "offload": "parameters"}, "parallel.offload: parameters needs parallel.zero: 3"),
        ({"zero": 2, "offload_dir": "/"}, "offload_dir needs offload: optimizer or parameters"),
    ],
)
def test_stages_that_have_nothing_to_offload(parallel, said):
    with pytest.raises(UserError, match=said):
        configuration.validate({"task": "causal_lm", "model": {"path": "x"}, "parallel": parallel})


@pytest.mark.parametrize(
    "parallel, said",
    [
        (
            {"offload": "optimizer", "deepspeed": {"offload_optimizer": {"device": "cpu"}}},
            "both say where state is kept",
        ),
        ({"deepspeed": {"offload_param": {"device": "nvme", "nvme_path": "/tmp"}}}, "in no checkpoint of fastft"),
    ],
)
def test_two_sources_and_a_disk_are_refused(lm_config, tmp_path, parallel, said):
    parallel["deepspeed"] = {"zero_optimization": parallel["deepspeed"]}
    lm_config["parallel"] = {"zero": 3, **parallel}
    code, output = launch.fastft("validate", launch.write_config(tmp_path / "c.yaml", lm_config), check=False)
    assert code == 1 and said in " ".join(output.split()) and "Traceback" not in output
