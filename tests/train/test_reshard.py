"""A run resumes with another number of ranks or another ZeRO stage:
the same samples, the same losses, the same settings of every group.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from train.test_resume import FEWER_BYTES, RUNS

import launch
from fastft import track
from fastft.train import checkpoint
from fastft.zero.stored import MASTER

STEPS, SAVED = 12, 6
# (ranks, stage, dtype) of the checkpoint -> (ranks, stage) that resume; tolerance of the loss
CASES = [
    ((2, 0, "fp32"), [(1, 0)], 1e-6),
    pytest.param((2, 1, "fp32"), [(1, 1), (4, 3)], 1e-6, marks=pytest.mark.long),
    ((2, 3, "fp32"), [(4, 3), (1, 2)], 1e-6),
    ((2, 2, "bf16"), [(1, 3)], 2e-3),
    ((2, 2, "bf16", FEWER_BYTES), [(1, 3)], 1e-2),
    ((1, 0, "bf16"), [(2, 0)], 2e-3),
]


@pytest.fixture
def without_dropout(lm_config, tmp_path) -> dict:
    """Masks differ with the number of ranks; without them the losses are comparable."""
    shutil.copytree(lm_config["model"]["path"], tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.0}))
    lm_config["model"]["path"] = str(tmp_path / "model")
    lm_config["optim"] = {"lr": 1e-3, "weight_decay": 0.1}
    lm_config["train"] = {"steps": STEPS, "log_every": 1}
    lm_config["checkpoint"] = {"every": SAVED, "keep": 9}
    return lm_config


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in track.read(run) if r["kind"] == "train"]


def same_state(before: Path, after: Path, ranks: int, zero: int, step: int = SAVED) -> None:
    """Every weight and all that the optimizer keeps, bit for bit."""
    (path, manifest, _), (other, written, _) = (checkpoint.find(folder, step) for folder in (before, after))
    assert (written["world_size"], written["zero"]) == (ranks, zero)
    first, second = checkpoint.stored(path, manifest), checkpoint.stored(other, written)
    one, two = first.weights(), second.weights()
    assert {*one} == {*two} and all(torch.equal(one[name].float(), two[name].float()) for name in one)
    if not zero:
        return
    assert first.places.keys() == second.places.keys()
    for name, place in first.places.items():
        state, others = (s.state(s.places[name].flat) for s in (first, second))
        assert state.keys() == others.keys() and state["step"] == others["step"] == step
        for key in (MASTER, *(k for k, value in state.items() if value.dim())):
            a, b = (s.piece(name, key, 0, place.numel) for s in (first, second))
            assert torch.equal(a, b) and a.dtype == b.dtype and a.any(), (name, key)


@pytest.mark.parametrize("before, after, tolerance", CASES, ids=lambda c: str(c[:3]) if isinstance(c, tuple) else "")
def test_the_run_goes_on(without_dropout, tmp_path, before, after, tolerance):
    world, stage, dtype, *more = before
    config = without_dropout
    config["optim"] |= dict(*more)
    config["parallel"] = {"zero": stage}
    config["model"]["dtype"] = dtype
    whole = tmp_path / "whole"
    config["run"]["dir"] = str(whole)
    launch.ranks(world, ["-m", "fastft", "train", launch.write_config(tmp_path / "c.yaml", config)])
    truth = losses(whole)
    model = load_file(whole / "model" / "model.safetensors")
    for ranks, zero in after:
        run = tmp_path / f"{ranks}-{zero}"
        shutil.copytree(whole, run, ignore=shutil.ignore_patterns(f"step-{STEPS}", "model", "metrics.jsonl"))
        config["run"]["dir"], config["parallel"] = str(run), {"zero": zero}
        again = launch.write_config(tmp_path / "again.yaml", config)
        launch.ranks(ranks, [RUNS, "again", tmp_path / f"again-{ranks}-{zero}", again])
        same_state(whole / "checkpoints", tmp_path / f"again-{ranks}-{zero}", ranks, zero)
        launch.ranks(ranks, ["-m", "fastft", "resume", run, f"parallel.zero={zero}"])
        rest = losses(run)
        assert len(rest) == STEPS - SAVED
        assert max(abs(a - b) for a, b in zip(rest, truth[SAVED:], strict=True)) <= tolerance, (ranks, zero)
        record = next(r for r in track.read(run) if r["kind"] == "run")["resumed_from"]
        assert record["world_size"] == world and record["resharded"] == (stage > 0)
        assert not list((run / "checkpoints").glob("*.tmp"))
        # Decay on a bias or a norm would be seen here: the settings of every group have come through.
        for name, tensor in load_file(run / "model" / "model.safetensors").items():
            torch.testing.assert_close(
                tensor,
                model[name],
                rtol=0,
                atol=2e-5 if dtype == "fp32" else 2e-2,
                msg=lambda m, where=f"{name} {ranks} {zero}": f"{where}: {m}",
            )


@pytest.mark.parametrize("world, stage, after", [(2, 3, [(1, 2), (1, 3)]), (2, 2, [(2, 3)]), (1, 1, [(2, 3)])])
def test_what_is_frozen_comes_from_the_checkpoint(without_dropout, tmp_path, world, stage, after):
    """As what is trained: not from the folder that the run began with, whose weights are others by now."""
    config = without_dropout
    config["model"]["freeze"] = ["model.embed_tokens*", "*layers.0.*"]
    config["parallel"], whole = {"zero": stage}, tmp_path / "whole"
    config["train"]["steps"], config["checkpoint"]["every"] = SAVED, SAVED
    config["run"]["dir"] = str(whole)
    launch.ranks(world, ["-m", "fastft", "train", launch.write_config(tmp_path / "c.yaml", config)])
    file = tmp_path / "model" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    for ranks, zero in after:
        run = tmp_path / f"{ranks}-{zero}"
        shutil.copytree(whole, run, ignore=shutil.ignore_patterns("model", "metrics.jsonl"))
        config["run"]["dir"], config["parallel"] = str(run), {"zero": zero}
        again = launch.write_config(tmp_path / "again.yaml", config)
        launch.ranks(ranks, [RUNS, "again", tmp_path / f"again-{ranks}-{zero}", again])
        same_state(whole / "checkpoints", tmp_path / f"again-{ranks}-{zero}", ranks, zero)


def test_stage_0_in_fp32_and_the_others_do_not_mix(without_dropout, tmp_path):
    config = without_dropout
    config["train"]["steps"] = 1
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", config))
    code, output = launch.fastft("resume", config["run"]["dir"], "parallel.zero=1", "train.steps=2", check=False)
    assert code == 1 and "was written with parallel.zero = 0, this run has 1" in output and "Traceback" not in output
