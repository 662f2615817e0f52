"""The JSON Schema takes what the loader takes, and refuses what it refuses."""

import copy

import jsonschema
import pytest

from fastft import config as configuration
from fastft import rooms
from fastft.config.keys import keys
from fastft.errors import UserError

VALIDATOR = jsonschema.Draft7Validator(configuration.json_schema(["csv", "jsonl"]))
MINIMAL = {"task": "classification", "model": {"path": "m"}}


def changed(changes: dict) -> dict:
    raw = copy.deepcopy(MINIMAL)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = raw
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = value
    return raw


GOOD = [
    {"model": "some/hub-id"},
    {"data.train": "x.csv"},
    {"data.train": ["a.csv", {"path": "b.csv", "format": "csv"}]},
    {"data.train": {"path": "b", "header": ["text", "label"]}},
    {"data.train": None, "data.eval": None},
    {"data.eval": "x.csv"},
    {"data.eval": ["x.csv", "y.csv"]},
    {"data.eval": {"path": "x.csv", "quoting": "none"}},
    {"data.eval": {"dev": "x.csv", "test": ["y.csv", {"path": "z.csv"}]}},
    {"optim.lr": "1e-4", "train.steps": "1_000", "optim.eps": 1e-8, "optim.warmup": ".1"},
    {"optim.lr": 1, "train.steps": 3.0, "optim.betas": [0.9, "0.95"]},
    {"data.multi_label": "yes", "checkpoint.background": "off", "run.offline": False},
    {"optim.layer_decay": 0.9, "optim.gradual_unfreezing": "epoch"},
    {"optim.layer_decay": {"rate": "9e-1"}, "optim.gradual_unfreezing": None},
    {"model.lora": True},
    {"model.lora": False},
    {"model.lora": {"r": 8, "targets": ["q_proj"]}},
    {"run.trackers": "wandb"},
    {"run.trackers": ["tensorboard", {"wandb": {"project": "x"}}]},
    {"run.trackers": {"mlflow": {}, "wandb": None}},
    {"data.order": "length_groups"},
    {"data.order": {"name": "length_groups", "window": 100}},
    {"optim.name": "sgd", "optim.momentum": 0.9},
    {"loss": None, "train": None, "optim": None},
    {"train.eval_every": "0.5 epochs", "checkpoint.every": "30m"},
    {"train.eval_every": "epoch", "checkpoint.every": "200"},
    {"data.overlength": "drop"},  # the older name of data.truncation
    {"parallel.zero": 3, "parallel.deepspeed": {"x": 1}, "batch.micro": "auto"},
    *({"task": name} for name in rooms.TASKS.names()),
]
BAD = [
    {"task": "clasification"},
    {"optim.lr": "fast"},
    {"optim.lr": -1},
    {"optim.lr": True},
    {"optim.learning_rate": 1e-4},
    {"optim.name": "adamx"},
    {"optim.momentum": 0.9},  # of another optimizer
    {"data.packing": "none"},  # of another task
    {"data.order": "sorted"},
    {"data.order": {"window": 100}},  # of another order
    {"data.train": 3},
    {"data.train": {"path": "x", "formt": "csv"}},
    {"data.train": {"path": "x", "format": "xml"}},
    {"data.max_length": 1},
    {"model.loar": {}},
    {"model": None},
    {"model.lora": {"r": 0}},
    {"run.trackers": "wanb"},
    {"run.trackers": [{"wandb": {"projekt": "x"}}]},
    {"train.steps": 2.5},
    {"train.eval_every": "2 weeks"},
    {"parallel.zero": 4},
    {"version": 2},
    {"optim.betas": [0.9]},
]


def test_it_is_a_schema():
    jsonschema.Draft7Validator.check_schema(VALIDATOR.schema)


@pytest.mark.parametrize("changes", GOOD, ids=str)
def test_good(changes):
    raw = changed(changes)
    VALIDATOR.validate(raw)
    configuration.validate(raw)


@pytest.mark.parametrize("changes", BAD, ids=str)
def test_bad(changes):
    raw = changed(changes)
    assert not VALIDATOR.is_valid(raw)
    if "format" not in str(changes.get("data.train")):  # whose formats the loader does not know
        with pytest.raises(UserError):
            configuration.validate(raw)


def test_every_key_is_described():
    assert not [key.path for key in keys() if not key.description]
