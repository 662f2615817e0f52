"""Runs that fastft 0.1.0 (commit 2dda5fb) left behind go on under this version, with the losses that it had.

make.py made them.
"""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml

import launch

HERE = Path(__file__).parent
MADE_IN = "/tmp/compat"  # the folder that make.py was given; it stands in the runs' config.yaml
CASES = [(task, stage) for task in ("causal_lm", "classification") for stage in (0, 1, 3)]


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(HERE / "runs.tar.gz") as tar:
        tar.extractall(folder, filter="data")
    for config in folder.rglob("config.yaml"):
        config.write_text(config.read_text().replace(MADE_IN, str(folder / "compat")))
    return folder / "compat"


def losses(run: Path, kind: str) -> list[float]:
    return [
        r["loss"]
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if (r := json.loads(line))["kind"] == kind
    ]


@pytest.mark.parametrize("task, stage", CASES)
def test_an_old_run_goes_on(old, task, stage):
    """Steps 11 to 20 from the checkpoint of step 10, on the prepared data of then, which is not made anew."""
    run = old / f"{task}-zero{stage}"
    expected = json.loads((run / "losses.json").read_text())
    # 0.1.0 keyed evaluation sets by the tokenizer's state after the training set was cut, and prepared them again at a
    # resume too.
    kept = "train/*.npy" if task == "classification" else "*/*.npy"
    prepared = {path: path.stat().st_mtime_ns for path in (run / "prepared").glob(kept)}
    launch.ranks(2 if stage else 1, ["-m", "fastft", "resume", run])
    assert len(losses(run, "train")) == 20
    # Another CPU sums in another order, and bf16 weights round that up to a unit in the last place.
    assert np.allclose(losses(run, "train"), expected["losses"], rtol=2e-3 if stage == 1 else 2e-5)
    assert np.allclose(losses(run, "eval"), expected["eval"], rtol=2e-3 if stage == 1 else 2e-5)
    assert {path: path.stat().st_mtime_ns for path in (run / "prepared").glob(kept)} == prepared
    assert json.loads((run / "checkpoints" / "BEST").read_text())["metric"] == "eval.loss"


@pytest.mark.parametrize("task, stage", [("causal_lm", 0), ("classification", 1)])
def test_an_old_configuration_trained_anew(old, tmp_path, task, stage):
    """The same YAML of then, from the start: the same 20 losses."""
    run = old / f"{task}-zero{stage}"
    raw = yaml.safe_load((run / "config.yaml").read_text())
    data = {key: raw["data"][key] for key in ("train", "eval", "max_length")}
    data["overlength"] = {"causal_lm": "split", "classification": "truncate"}[task]
    short = {
        "task": task,
        "model": {"path": raw["model"]["path"], "dtype": raw["model"]["dtype"]},
        "data": data,
        "batch": {"size": 6},
        "optim": {key: raw["optim"][key] for key in ("lr", "warmup", "weight_decay")},
        "train": {"steps": 20, "log_every": 1, "eval_every": 10},
        "parallel": {"zero": stage},
        "run": {**raw["run"], "dir": str(tmp_path / "run")},
    }
    config = launch.write_config(tmp_path / "c.yaml", short)
    launch.ranks(2 if stage else 1, ["-m", "fastft", "train", config])
    expected = json.loads((run / "losses.json").read_text())
    assert np.allclose(losses(tmp_path / "run", "train"), expected["losses"], rtol=2e-3 if stage == 1 else 2e-5)


def test_export_and_trace_of_an_old_run(old, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(old / "causal_lm-zero1", run)
    launch.fastft("export", run, tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").stat().st_size > 10_000
    code, output = launch.fastft("trace", run, "--step", "3")
    assert code == 0 and re.search(r"sample \d+: .*texts\.jsonl:\d+", output)
