"""The fused ZeRO step is DeepSpeed's step with FusedAdamW, bit for bit, and says so when it is not in place."""

import copy
import shutil

import numpy as np
import pytest
import torch
from train.test_resume import curve, same_checkpoints

import launch
from fastft import track
from fastft.zero import fused_step as zero_step

RUNS = launch.ROOT / "tests" / "train" / "runs.py"


def config_of(
    base: dict, tmp_path, name: str, zero: int, dtype: str, fused: bool, state_dtype: str = "fp32", **deepspeed
) -> dict:
    config = copy.deepcopy(base)
    config["data"]["cache"] = str(tmp_path / "prepared")
    config["train"] = {"steps": 5, "log_every": 1}
    config["checkpoint"] = {"every": 5}
    config["optim"] |= {"grad_clip": 0.5, "state_dtype": state_dtype}  # clipping bites at every step of this model
    config["model"]["dtype"] = dtype
    config["parallel"] = {"zero": zero, "fused_step": fused, **({"deepspeed": deepspeed} if deepspeed else {})}
    config["run"]["dir"] = str(tmp_path / name)
    return config


CASES = [(zero, "bf16", {}) for zero in (1, 2, 3)]
SHARDED = [*CASES, (3, "fp32", {}), (2, "bf16", {"state_dtype": "int8"})]
MORE = [
    (2, "fp32", {}),
    (3, "bf16", {"state_dtype": "bf16"}),
    (3, "bf16", {"zero_optimization": {"sub_group_size": 20000}}),
]


@pytest.mark.parametrize(
    "world, cases",
    [(1, CASES), (2, SHARDED), pytest.param(2, MORE, marks=pytest.mark.long)],  # alone there is no padding, no neighbor
    ids=["1", "2", "2-more"],
)
def test_fused_step_is_the_unfused_step(lm_config, tmp_path, world, cases):
    """Stages 1-3, bf16 and fp32, many sub-groups, low-byte state; clipping, decay groups, a schedule: weights,
    optimizer state, losses, norms.
    """
    paths, runs = [], []
    for i, (zero, dtype, deepspeed) in enumerate(cases):
        for fused in (True, False):
            name = f"{i}-z{zero}-{dtype}-{'fused' if fused else 'unfused'}"
            runs.append(name)
            paths.append(
                launch.write_config(
                    tmp_path / f"{name}.yaml", config_of(lm_config, tmp_path, name, zero, dtype, fused, **deepspeed)
                )
            )
    launch.ranks(world, [RUNS, "train", *paths])
    for fused, unfused in zip(runs[::2], runs[1::2], strict=True):
        said = [
            next(r["zero_step"] for r in track.read(tmp_path / name) if r["kind"] == "run") for name in (fused, unfused)
        ]
        assert said == ["fused", "unfused: parallel.fused_step: false"], fused
        first, second = curve(tmp_path / fused), curve(tmp_path / unfused)
        assert [c[:3] for c in first] == [c[:3] for c in second], fused
        # stage 3 reports its norm in float64, where the order of a sum shows; the factor made of it is float32
        assert np.allclose([c[3] for c in first], [c[3] for c in second], rtol=1e-12, atol=0), fused
        same_checkpoints(*(tmp_path / name / "checkpoints" / "step-5" for name in (fused, unfused)))


@pytest.mark.parametrize("zero", [pytest.param(2, marks=pytest.mark.long), 3])
def test_checkpoints_interchange(lm_config, tmp_path, zero):
    """A run saved by the fused step resumes unfused, and the other way round; both are the run that never stopped."""
    stopped, paths = {}, []
    for fused in (True, False):
        config = config_of(lm_config, tmp_path, f"{fused}", zero, "bf16", fused)
        config["train"]["steps"], config["checkpoint"]["every"] = 6, 3
        paths.append(launch.write_config(tmp_path / f"{fused}.yaml", config))
        stopped[fused] = tmp_path / f"{fused}-stopped"
    launch.ranks(2, [RUNS, "train", *paths])
    for fused, folder in stopped.items():
        shutil.copytree(tmp_path / f"{fused}", folder)
        shutil.rmtree(folder / "checkpoints" / "step-6")
        launch.ranks(2, ["-m", "fastft", "resume", folder, f"parallel.fused_step={str(not fused).lower()}"])
        same_checkpoints(tmp_path / f"{fused}" / "checkpoints" / "step-6", folder / "checkpoints" / "step-6")


NAN = """
import os, torch
from fastft.cli import leave
from fastft import config as configuration
from fastft.optim import FusedAdamW
from fastft.zero import fused_step as zero_step
from fastft.ranks import environment
from fastft.zero import engine
from fastft.zero.settings import deepspeed_config

def build(zero):
    config = configuration.validate({"task": "causal_lm", "model": {"path": "x", "dtype": "bf16"},
                                     "parallel": {"zero": zero}, "run": {"device": "cpu"}})
    ranks = environment(config)
    engine.start_process_group()
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(7, 5), torch.nn.Linear(5, 3)).bfloat16()
    optimizer = FusedAdamW(net.parameters(), lr=0.1)
    return engine.build_engine(net, optimizer, deepspeed_config(config, ranks)), optimizer, ranks

def step(built, x):
    built.set_gradient_accumulation_boundary(True)
    built.backward(built(x).float().square().sum())
    built.step()

for zero in (1, 2, 3):
    built, optimizer, ranks = build(zero)
    assert built.fastft_step == "fused", built.fastft_step
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(ranks.rank)).bfloat16()
    step(built, x)
    before = {k: {n: t.clone() for n, t in s.items()} for k, s in optimizer.state.items()}
    masters = [k.detach().clone() for k in before]
    step(built, x * float("nan") if ranks.rank == 1 else x)  # one rank only; both must skip
    assert built.optimizer.overflow
    for key, master in zip(before, masters, strict=True):
        assert torch.equal(key, master)
        assert all(torch.equal(optimizer.state[key][n], t) for n, t in before[key].items())
    step(built, x)
    assert not built.optimizer.overflow and all(s["step"].item() == 2 for s in optimizer.state.values())
    assert not any(torch.equal(key, master) for key, master in zip(before, masters, strict=True))

name = type(built.optimizer).__name__
zero_step.TESTED[name] = "another"
built, _, _ = build(3)
assert built.fastft_step.startswith("unfused: DeepSpeed") and name in built.fastft_step, built.fastft_step
step(built, x)  # DeepSpeed's own step works
zero_step.METHODS[name].append("a_method_that_is_gone")
assert "not the one the fused step was tested with" in zero_step.why_not(built.optimizer, built.optimizer.optimizer)
torch.distributed.destroy_process_group()
leave(0)
"""


def test_nan_on_one_rank_skips_on_all_and_an_unknown_deepspeed_stays_unfused(tmp_path):
    (tmp_path / "nan.py").write_text(NAN)
    launch.ranks(2, [tmp_path / "nan.py"])


def test_joined_gradients_are_views_of_their_neighbours():
    flat, other = torch.arange(12.0), torch.arange(3.0)
    parts = [flat[0:2], flat[2:7].reshape(1, 5), flat[8:12], other, flat[7:8]]
    joined = zero_step._joined(parts)
    assert [j.numel() for j in joined] == [7, 4, 3, 1]
    assert torch.equal(torch.cat(joined), torch.cat([p.reshape(-1) for p in parts]))
    assert joined[0].data_ptr() == flat.data_ptr()
