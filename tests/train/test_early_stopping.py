"""Early stopping on prescribed evaluations, and in real runs: where it stops, what it exports, how it resumes."""

import copy
import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

import launch
from fastft import config as configuration
from fastft import track
from fastft.errors import UserError
from fastft.tasks.base import Metric
from fastft.train import checkpoint
from fastft.train.observers.base import Save, Stop
from fastft.train.observers.early_stopping import EarlyStopping, EarlyStoppingSettings

NAN = math.nan


def observer(lower: bool = True, **settings) -> EarlyStopping:
    task = SimpleNamespace(metric=lambda name, key: Metric("loss", lower_is_better=lower))
    view = SimpleNamespace(job=SimpleNamespace(task=task))
    return EarlyStopping(EarlyStoppingSettings(metric="eval.loss", **settings), view)


def stops_after(watch: EarlyStopping, values: list[float]) -> tuple[int | None, list[int]]:
    """After which of the evaluations it stops, and which it saves; both counted from 1."""
    saves = []
    for i, value in enumerate(values, 1):
        actions = watch.after_evaluation(i, {"eval": {"loss": value}})
        saves += [i] if Save() in actions else []
        if any(isinstance(action, Stop) for action in actions):
            return i, saves
    return None, saves


@pytest.mark.parametrize(
    "values, settings, stop, saves",
    [
        ([3, 2, 1, 1, 1], {"patience": 2}, 5, [1, 2, 3]),  # what equals the best is no improvement
        ([3, 4, 2, 4, 1, 4, 4], {"patience": 2}, 7, [1, 3, 5]),  # an improvement sets the count to 0
        (
            [NAN, 3, NAN, 2, NAN, NAN],
            {"patience": 2},
            6,
            [2, 4],
        ),  # NaN is never best, first or later, and no improvement
        ([NAN, math.inf], {"patience": 2}, 2, []),
        ([-math.inf, 1, 2], {"patience": 3}, None, [2]),
        ([3, 2.9, 2.8, 2.7], {"patience": 3, "min_delta": 0.5}, 4, [1, 2, 3, 4]),  # best all the same
        ([3, 2.9, 2.4, 2.3], {"patience": 2, "min_delta": 0.5}, None, [1, 2, 3, 4]),  # small steps add up
        ([3, 2, 0.5, 0.1], {"threshold": 0.5}, 3, [1, 2, 3]),
    ],
)
def test_when_it_stops(values, settings, stop, saves):
    assert stops_after(observer(**settings), values) == (stop, saves)


def test_higher_is_better_and_the_state_goes_on():
    assert stops_after(observer(lower=False, patience=2, threshold=0.9), [0.1, 0.3, 0.2, 0.95]) == (4, [1, 2, 4])
    values = [3, 1, 2, 2, 2]
    for cut in range(5):
        first, second = observer(patience=3), observer(patience=3)
        stops_after(first, values[:cut])
        second.load_state(json.loads(json.dumps(first.state())))
        assert cut + stops_after(second, values[cut:])[0] == 5
    other = observer(patience=3)
    other.load_state({**first.state(), "metric": "eval.accuracy"})
    assert other.waited == 0 and other.best is None


@pytest.fixture
def diverging(classification_config, tmp_path) -> dict:
    """A learning rate that ruins the model: the loss is best early, and does not come back."""
    config = copy.deepcopy(classification_config)
    config["optim"] = {"lr": 0.05, "schedule": "constant"}
    config["train"] = {"steps": 30, "log_every": 1, "eval_every": 2}
    config["train"]["early_stopping"] = {"metric": "test.loss", "patience": 3}
    config["checkpoint"] = {"keep": 2}
    return config


def expected_stop(run, patience: int) -> tuple[int, int]:
    """Step of the best evaluation, and of the one that ends the run, from its record."""
    best, where, waited = math.inf, 0, 0
    for record in (r for r in track.read(run) if r["kind"] == "eval"):
        waited = 0 if record["loss"] < best else waited + 1
        if waited == 0:
            best, where = record["loss"], record["step"]
        if waited == patience:
            return where, record["step"]
    raise AssertionError("never")


def same_weights(model, folder, step: int, zero: int) -> bool:
    path, manifest, _ = checkpoint.find(folder, step)
    assert manifest["zero"] == zero
    state = checkpoint.stored(path, manifest).weights()
    return all(torch.equal(state[name], tensor) for name, tensor in load_file(model / "model.safetensors").items())


@pytest.mark.parametrize("world, zero", [pytest.param(1, 0, marks=pytest.mark.long), (2, 1)])
def test_a_run_stops_exports_its_best_and_resumes_amid_the_count(diverging, tmp_path, world, zero):
    diverging["parallel"] = {"zero": zero}
    whole = tmp_path / "whole"
    diverging["run"]["dir"] = str(whole)
    diverging["checkpoint"] |= {"every": 1, "keep": 40}
    outputs = launch.ranks(world, ["-m", "fastft", "train", launch.write_config(tmp_path / "c.yaml", diverging)])
    best, stop = expected_stop(whole, 3)
    end = track.read(whole)[-1]
    evaluated = next(r for r in track.read(whole) if r["kind"] == "eval" and r["step"] == best)
    assert (end["kind"], end["step"], end["exported_step"], stop < 30) == ("end", stop, best, True)
    assert end["eval"]["test"]["loss"] == evaluated["loss"] and "did not improve in 3 evaluations" in end["stopped"]
    assert f"best: step {best} (exported), test.loss" in outputs[0]
    assert f"Weights after step {best}" in (whole / "model" / "README.md").read_text()
    assert json.loads((whole / "checkpoints" / "BEST").read_text())["step"] == best
    assert same_weights(whole / "model", whole / "checkpoints", best, zero)
    assert not same_weights(whole / "model", whole / "checkpoints", stop, zero)

    resumed = tmp_path / "resumed"  # one evaluation without improvement is behind it
    later = [f"step-{step}" for step in range(best + 4, stop + 1)]
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns(*later, "model", "metrics.jsonl"))
    launch.ranks(world, ["-m", "fastft", "resume", resumed])
    again = track.read(resumed)[-1]
    assert [again[k] for k in ("step", "exported_step", "stopped")] == [
        end[k] for k in ("step", "exported_step", "stopped")
    ]
    assert load_file(resumed / "model/model.safetensors").keys() == load_file(whole / "model/model.safetensors").keys()
    assert same_weights(resumed / "model", whole / "checkpoints", best, zero)
    if world > 1:  # as another number of ranks goes on and finishes: the best is of two ranks, the last of one
        shutil.copytree(whole, tmp_path / "one", ignore=shutil.ignore_patterns(*later, "model", "metrics.jsonl"))
        launch.fastft("resume", tmp_path / "one")
        assert track.read(tmp_path / "one")[-1]["exported_step"] == best
        assert same_weights(tmp_path / "one" / "model", whole / "checkpoints", best, zero)
        return
    code, output = launch.fastft("resume", whole, check=False)
    assert code == 1 and f"finished: it stopped at step {stop}: test.loss did not improve" in " ".join(output.split())
    shutil.rmtree(whole / "model")  # lost, or never written: the export is finished
    launch.fastft("resume", whole)
    assert same_weights(whole / "model", whole / "checkpoints", best, zero)


def test_a_run_that_reaches_its_end_exports_the_best_too(diverging, tmp_path):
    """With only the best and the last checkpoint on the disk, whatever checkpoint.every says."""
    diverging["train"] |= {"steps": 7, "early_stopping": {"metric": "test.loss", "patience": 9}}
    _, output = launch.fastft("train", launch.write_config(tmp_path / "c.yaml", diverging))
    run = tmp_path / "run"
    losses = {r["step"]: r["loss"] for r in track.read(run) if r["kind"] == "eval"}
    best, end = min(losses, key=losses.get), track.read(run)[-1]
    assert set(losses) == {2, 4, 6, 7} and best < 7 and end["exported_step"] == best and end["stopped"] is None
    assert f"best: step {best} (exported)" in output and {best, 7} <= set(checkpoint.steps(run / "checkpoints"))
    assert yaml.safe_load((run / "config.yaml").read_text())["checkpoint"]["best_by"] == "test.loss"


def test_what_is_refused(diverging, tmp_path):
    def refused(part: str, **changes) -> None:
        config = copy.deepcopy(diverging)
        for key, value in changes.items():
            section, field = key.split("__")
            config[section][field] = value
        with pytest.raises(UserError, match=part):
            configuration.validate(config)

    refused("train.early_stopping needs train.eval_every", train__eval_every=None)
    refused("checkpoint.best_by: test.accuracy contradicts early_stopping", checkpoint__best_by="test.accuracy")
    refused("train.early_stopping.patience", train__early_stopping={"metric": "test.loss", "patience": 0})
    assert configuration.validate(diverging).checkpoint.best_by == "test.loss"
    assert configuration.validate({"task": "causal_lm", "model": {"path": "m"}}).checkpoint.best_by is None
    diverging["train"]["early_stopping"] = "test.los"
    code, output = launch.fastft("train", launch.write_config(tmp_path / "c.yaml", diverging), check=False)
    assert code == 1 and "train.early_stopping.metric: test.los is not measured" in output and "test.loss" in output
