"""`fastft config explain`, `init` and the names that other trainers have."""

import re

import pytest
import yaml

import launch
from fastft import config as configuration
from fastft import rooms
from fastft.config.example import example
from fastft.config.foreign import FOREIGN, ours
from fastft.config.keys import keys
from fastft.config.reference import explain
from fastft.errors import UserError

PATHS = {key.path for key in keys()}


@pytest.mark.parametrize(
    "key, task, parts",
    [
        ("optim.warmup", None, ["integer or number", "default:   0", "every run", "a fraction (0.03)"]),
        ("optim.schedule", None, ["values:    linear, cosine, constant, wsd"]),
        ("optim.name", None, ["adam, fused_adamw, sgd"]),
        ("optim.momentum", None, ["optim.name: sgd"]),
        ("data.label", None, ["task: classification", "default:   label"]),
        ("data.labels", None, ["File with one label", "task: token_classification"]),  # of two tasks, in two ways
        ("data.eval.dev.format", None, ["data.train.format", "jsonl"]),
        ("data.overlength", None, ["data.truncation"]),  # an older name
        ("data", "classification", ["multi_label", "max_length"]),
        ("model.lora", None, ["rank", "alpha", "default:   null"]),
        ("run.trackers.wandb.project", None, ["default:   fastft"]),
        ("", None, ["optim", "Where and on what a run takes place"]),
    ],
)
def test_explain(key, task, parts):
    said = explain(key, task)
    assert not [part for part in parts if part.lower() not in said.lower()], said


def test_explain_for_a_task():
    assert "token_classification" not in explain("data.labels", "classification")
    assert "packing" in explain("data") and "packing" not in explain("data", "classification")


@pytest.mark.parametrize(
    "key, task, part",
    [
        ("optim.wramup", None, "Did you mean optim.warmup"),
        ("warmup", None, "Did you mean optim.warmup?"),
        ("learning_rate", None, "Here it is optim.lr."),
        ("data.label", "causal_lm", "task: classification"),
        ("xyz", None, "Known: batch, checkpoint"),
    ],
)
def test_explain_of_no_key(key, task, part):
    with pytest.raises(UserError) as e:
        explain(key, task)
    assert part in str(e.value)


@pytest.mark.parametrize("task", rooms.TASKS.names())
def test_init_loads(task, tmp_path):
    """As it is, and with every commented key of the task at the default that it shows."""
    text = example(task, "csv")
    (tmp_path / "my.yaml").write_text(text)
    loaded = configuration.load(tmp_path / "my.yaml")
    assert loaded.task == task and loaded.train.epochs == 3
    (tmp_path / "all.yaml").write_text(re.sub(r"^  # (\w+: )", r"  \1", text, flags=re.MULTILINE))
    whole = yaml.safe_load((tmp_path / "all.yaml").read_text())
    assert {key.name for key in keys() if f"task: {task}" in key.used and key.section == "data"} <= set(whole["data"])
    configuration.load(tmp_path / "all.yaml")


@pytest.mark.parametrize("name", FOREIGN)
def test_names_of_other_trainers_lead_to_keys_that_are_there(name):
    assert name not in {path for path in PATHS if "." not in path}
    for path in re.findall(
        r"\b(?:model|data|batch|optim|loss|train|parallel|checkpoint|run)\.[a-z_.]*[a-z_]", ours(name)
    ):
        assert path in PATHS | {"run.dir"}, path


def test_the_page_for_those_who_come_from_elsewhere():
    """Its keys are there, and what it calls theirs is told ours by the loader, too."""
    text = (launch.ROOT / "docs" / "coming_from.md").read_text()
    table = text.partition("## Keys")[2].partition("## Commands")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 25
    for *theirs, here in rows:
        assert {path.partition(":")[0] for path in re.findall(r"`([^`]+)`", here)} <= PATHS, here
        names = {name for cell in theirs for name in re.findall(r"`([^`]+)`", cell)}
        assert names <= set(FOREIGN), names - set(FOREIGN)


@pytest.mark.parametrize(
    "key, value, part",
    [
        ("learning_rate", 1e-4, "learning_rate: unknown key. Here it is optim.lr."),
        ("train.learning_rate", 1e-4, "Here it is optim.lr."),
        ("per_device_train_batch_size", 8, "Here it is batch.size, which is per optimizer step, over all ranks"),
        ("num_train_epochs", 3, "Here it is train.epochs."),
        ("gradient_accumulation_steps", 4, "There is no such key: batch.size is the whole step"),
        ("micro_batch_size", 2, "batch.micro"),
        ("cutoff_len", 512, "data.max_length"),
        ("load_in_4bit", True, "model.quantize: nf4"),
        ("train.lr", 1e-4, "Did you mean optim.lr?"),
        ("data.packing", "none", "It is there only with task: causal_lm, masked_lm or sft."),
    ],
)
def test_another_trainers_key_in_a_file(key, value, part):
    raw = {"task": "classification", "model": {"path": "m"}}
    section, _, name = key.rpartition(".")
    (raw.setdefault(section, {}) if section else raw)[name] = value
    with pytest.raises(UserError) as e:
        configuration.validate(raw)
    assert part in str(e.value), e.value
