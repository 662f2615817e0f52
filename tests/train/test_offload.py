"""State in the host's memory: the same run, bit for bit."""

import copy
import shutil

import pytest
from train.test_reshard import same_state
from train.test_resume import RUNS, curve

import launch
from fastft import config as configuration
from fastft.errors import UserError

CASES = [(1, "bf16", "optimizer"), (2, "fp32", "optimizer"), (3, "bf16", "optimizer"), (3, "fp32", "parameters")]
CASES += [(2, "bf16", "optimizer"), (3, "bf16", "parameters")]


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_offload_changes_no_bit(lm_config, tmp_path, world):
    """Losses, norms, checkpoints; several micro-steps, clipping that bites at every step of this model."""
    paths, runs = [], {}
    for zero, dtype, offload in CASES:
        for where in (None, offload):
            config = copy.deepcopy(lm_config)
            config["data"]["cache"] = str(tmp_path / "prepared")
            config["train"] = {"steps": 4, "log_every": 1}
            config["batch"] = {"size": 8, "micro": 2}
            config["optim"] |= {"grad_clip": 0.5, "lr": 1e-3}
            config["model"]["dtype"] = dtype
            config["checkpoint"] = {"every": 2, "keep": 2}
            config["parallel"] = {"zero": zero, "offload": where}
            name = f"{zero}-{dtype}-{where}"
            config["run"]["dir"] = str(tmp_path / name)
            runs[zero, dtype, where] = tmp_path / name
            paths.append(launch.write_config(tmp_path / f"{name}.yaml", config))
    launch.ranks(world, [RUNS, "train", *dict.fromkeys(paths)])
    for zero, dtype, offload in CASES:
        first, second = runs[zero, dtype, None], runs[zero, dtype, offload]
        assert curve(first) == curve(second), (zero, dtype, offload)
        same_state(first / "checkpoints", second / "checkpoints", world, zero, step=4)
    # A checkpoint of the one is one of the other.
    whole = runs[3, "bf16", "parameters"]
    for name, run in (("there", whole), ("back", runs[3, "bf16", None])):
        resumed = tmp_path / name
        shutil.copytree(run, resumed, ignore=shutil.ignore_patterns("step-4", "model", "metrics.jsonl"))
        other = "null" if name == "there" else "parameters"
        launch.ranks(world, ["-m", "fastft", "resume", resumed, f"parallel.offload={other}"])
        same_state(whole / "checkpoints", resumed / "checkpoints", world, 3, step=4)


@pytest.mark.parametrize(
    "parallel, said",
    [
        ({"zero": 0, "offload": "optimizer"}, "parallel.offload: optimizer needs parallel.zero: 1 or more"),
        ({"zero": 2, "offload": "parameters"}, "parallel.offload: parameters needs parallel.zero: 3"),
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
