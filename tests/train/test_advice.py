"""Settings that make little sense are told, and those that make sense are not."""

import copy
import json
import shutil
from pathlib import Path

import datasets
import pytest

import launch
from fastft import assemble
from fastft import config as configuration
from fastft.train.advice import advice
from fastft.train.schedule import Schedule


def told(raw: dict, **changes) -> list[str]:
    """``changes``: values by section__key."""
    raw = copy.deepcopy(raw)
    for key, value in changes.items():
        section, name = key.split("__")
        raw.setdefault(section, {})[name] = value
    config = configuration.validate(raw)
    job = assemble.start(config)
    assemble.add_data(job)
    return advice(job, Schedule.of(config, job.order, job.task.max_length))


def test_what_makes_sense_is_not_told(classification_config):
    assert told(classification_config) == []
    assert told(classification_config, train__eval_every=2, checkpoint__every="30m", optim__warmup=0.1) == []
    assert told(classification_config, optim__name="sgd", optim__lr=0.5, train__eval_every="0.1 epochs") == []


def test_bf16_where_the_cpu_has_none(classification_config, monkeypatch):
    from fastft.train import advice as module

    for has, number in ((True, 0), (False, 1)):
        monkeypatch.setattr(module, "cpu_multiplies_bf16", lambda has=has: has)
        found = told(classification_config, model__dtype="bf16")
        assert len(found) == number and all("model.dtype: fp32 is faster here" in sentence for sentence in found)
    assert told(classification_config) == []


NONSENSE = {
    "warm-up": ({"optim__warmup": 500}, "optim.warmup: 500 steps of warm-up in a run of 4"),
    "warm-up and decay": (
        {"optim__warmup": 2, "optim__decay": 3, "optim__schedule": "wsd"},
        "optim.decay: warm-up and decay are more than the run's 4 steps",
    ),
    "Adam's rate": ({"optim__lr": 0.5}, "optim.lr: 0.5 is far above what fused_adamw is used with"),
    "SGD's rate": ({"optim__name": "sgd", "optim__lr": 50}, "optim.lr: 50 is far above what sgd is used with"),
    "no rate": ({"optim__lr": 1e-12}, "optim.lr: 1e-12 is so small"),
    "batch": ({"batch__size": 5000}, "batch.size: a step takes 5,000 sequences, and the training set has 48"),
    "batch of an epoch": (
        {"batch__size": 5000, "train__steps": None, "train__epochs": 1},
        "batch.size: 5,000 is more than the training set's 48 sequences: an epoch is one step",
    ),
    "evaluation": (
        {"train__eval_every": 100},
        "train.eval_every: 100 is longer than the run of 4 steps (0.667 epochs)",
    ),
    "saving": ({"checkpoint__every": "2 epochs"}, "checkpoint.every: 2 epochs is longer than the run"),
    "best of one": ({"checkpoint__best_by": "test.loss"}, "checkpoint.best_by: without checkpoint.every"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense(classification_config, name):
    changes, part = NONSENSE[name]
    found = told(classification_config, **changes)
    assert len(found) == 1 and found[0].startswith(part), found


def test_training_data_that_is_evaluated(classification_config, tmp_path):
    train = classification_config["data"]["train"]
    (told_same,) = told(classification_config, data__eval={"dev": train})
    assert told_same.startswith(f"data.eval.dev: {train} is training data too")
    shutil.copy(train, tmp_path / "copy.jsonl")
    assert len(told(classification_config, data__eval={"dev": str(tmp_path / "copy.jsonl")})) == 1
    assert told(classification_config, data__eval={"train": train}) == []


def test_splits_of_one_data_set_are_told_apart(classification_config, tmp_path):
    rows = [json.loads(line) for line in Path(classification_config["data"]["train"]).read_text().splitlines()]
    parts = {name: datasets.Dataset.from_list(part) for name, part in (("train", rows[:24]), ("test", rows[24:]))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "saved")
    source = {"path": str(tmp_path / "saved"), "split": "train"}
    classification_config["data"] |= {"train": source, "eval": {"dev": {**source, "split": "test"}}}
    assert told(classification_config) == []
    classification_config["data"]["eval"] = {"dev": source}
    assert len(told(classification_config)) == 1


def test_validate_and_train_say_it(classification_config, tmp_path):
    classification_config["optim"]["warmup"] = 500
    path = launch.write_config(tmp_path / "c.yaml", classification_config)
    for verb in ("validate", "train"):
        _, output = launch.fastft(verb, path)
        assert "warning: optim.warmup: 500 steps of warm-up in a run of 4" in " ".join(output.split())
    _, output = launch.fastft("validate", path, "--json")
    assert len(json.loads(output.strip().splitlines()[-1])["advice"]) == 1
