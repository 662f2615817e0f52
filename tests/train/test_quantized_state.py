"""optim.master and optim.state_dtype in the real loop, on two ranks:
quantized state and parameters learn what fp32 learns.
"""

import torch

import launch
from fastft import track

RUNS = launch.ROOT / "tests" / "train" / "runs.py"
VARIANTS = {
    "fp32": {},
    "int8": {"state_dtype": "int8"},
    "remainder": {"master": "remainder", "state_dtype": "bf16"},
    "stochastic": {"master": "stochastic", "state_dtype": "int8"},
}


def test_every_master_learns_the_same(lm_config, tmp_path):
    """Losses of 30 steps of ZeRO-2: means of ten within 0.02 of fp32's (bf16 gradients and dropout of the same draws),
    and falling.
    """
    lm_config["model"]["dtype"] = "bf16"
    lm_config["parallel"] = {"zero": 2}
    lm_config["train"] = {"steps": 30, "log_every": 1}
    paths = []
    for name, optim in VARIANTS.items():
        config = {
            **lm_config,
            "optim": {**lm_config["optim"], **optim},
            "run": {**lm_config["run"], "dir": str(tmp_path / name)},
        }
        paths.append(launch.write_config(tmp_path / f"{name}.yaml", config))
    launch.ranks(2, [RUNS, "train", *paths])
    curves = {
        name: torch.tensor([r["loss"] for r in track.read(tmp_path / name) if r["kind"] == "train"]).view(3, 10).mean(1)
        for name in VARIANTS
    }
    assert curves["fp32"][2] < curves["fp32"][0] - 0.3, curves
    for curve in curves.values():
        assert (curve - curves["fp32"]).abs().max() < 0.02, curves
