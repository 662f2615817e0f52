"""What users get wrong: each mistake ends with its exit code and one message, which names file, row or key and the way
out; no traceback, nothing left behind, and nothing imported that finding it does not need.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import launch
from fastft.cli.main import main

GOOD = [{"text": f"{word} number {i}", "label": word} for i in range(8) for word in ("apple", "bear")]


def rows(folder: Path, name: str, found: list) -> str:
    lines = (line if isinstance(line, str) else json.dumps(line) for line in found)
    (folder / name).write_text("".join(f"{line}\n" for line in lines))
    return str(folder / name)


def binary(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_bert):
    """A folder with a good run's configuration."""
    folder = tmp_path_factory.mktemp("mistakes")
    config = {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": rows(folder, "good.jsonl", GOOD), "max_length": 32},
        "batch": {"size": 4},
        "optim": {"lr": 1e-3},
        "train": {"steps": 2},
        "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1},
    }
    return folder, config


def said(capsys, *argv: object) -> tuple[int, str]:
    """(exit code, standard error) of a command in this process."""
    before = os.getcwd()
    try:
        main([str(a) for a in argv])
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    finally:
        os.chdir(before)
    return code, capsys.readouterr().err


def changed(config: dict, changes: dict) -> dict:
    """``changes``: dotted keys to values; None as a value stays None, REMOVE takes the key out."""
    config = copy.deepcopy(config)
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for name in parents:
            node = node.setdefault(name, {})
        if value is REMOVE:
            node.pop(last, None)
        else:
            node[last] = value
    return config


REMOVE = object()

# Name -> changes, and what the message has. Found from the file alone: no torch is imported.
CONFIG: dict[str, tuple[dict, list[str]]] = {
    "unknown section": ({"optimizer": {"lr": 1}}, ["optimizer: unknown key", "'optim'"]),
    "unknown key": ({"optim.learning_rate": 1}, ["optim.learning_rate: unknown key"]),
    "unknown key in batch": ({"batch.sise": 1}, ["batch.sise", "'size'"]),
    "unknown key in run": ({"run.output_dir": "x"}, ["run.output_dir: unknown key"]),
    "unknown key in model": ({"model.name": "x"}, ["model.name: unknown key"]),
    "unknown key in data": ({"data.path": "x"}, ["data.path: unknown key"]),
    "unknown key in train": ({"train.epoch": 3}, ["train.epoch", "'epochs'"]),
    "unknown key in checkpoint": ({"checkpoint.save_every": 3}, ["checkpoint.save_every: unknown key"]),
    "unknown key in parallel": ({"parallel.zero_stage": 3}, ["parallel.zero_stage: unknown key"]),
    "unknown key in loss": ({"loss.smoothing": 0.1}, ["loss.smoothing: unknown key"]),
    "key of another task": ({"data.packing": "none"}, ["data.packing: unknown key"]),
    "key of another optimizer": ({"optim.momentum": 0.9}, ["optim.momentum: unknown key"]),
    "unknown task": ({"task": "clasification"}, ["unknown task 'clasification'", "Did you mean 'classification'"]),
    "no task": ({"task": REMOVE}, ["task: required", "classification, masked_lm"]),
    "task is a list": ({"task": ["classification"]}, ["task"]),
    "no model": ({"model": REMOVE}, ["model: required"]),
    "no path of a model": ({"model": {"dtype": "fp32"}}, ["model.path: required"]),
    "model is a number": ({"model": 3}, ["model.path"]),
    "unknown optimizer": ({"optim.name": "adamx"}, ["unknown optimizer 'adamx'", "Did you mean 'adam'"]),
    "unknown order": ({"data.order": "sorted"}, ["unknown sample order 'sorted'", "permutation"]),
    "unknown tracker": ({"run.trackers": ["wanb"]}, ["wanb", "wandb"]),
    "unknown edit": ({"model.loar": {"r": 8}}, ["model.loar", "lora"]),
    "unknown schedule": ({"optim.schedule": "cosin"}, ["optim.schedule", "cosine"]),
    "unknown dtype": ({"model.dtype": "fp16"}, ["model.dtype", "bf16"]),
    "unknown attention": ({"model.attention": "flash"}, ["model.attention", "flash_attention_2"]),
    "unknown device": ({"run.device": "gpu"}, ["run.device", "cuda"]),
    "unknown truncation": ({"data.truncation": "cut"}, ["data.truncation", "truncate"]),
    "learning rate is a word": ({"optim.lr": "fast"}, ["optim.lr", "'fast'"]),
    "learning rate is negative": ({"optim.lr": -1e-3}, ["optim.lr"]),
    "learning rate is infinite": ({"optim.lr": float("inf")}, ["optim.lr", "finite"]),
    "learning rate is not a number": ({"optim.lr": float("nan")}, ["optim.lr"]),
    "learning rate is a list": ({"optim.lr": [1e-3]}, ["optim.lr"]),
    "steps is zero": ({"train.steps": 0}, ["train.steps"]),
    "steps is a fraction": ({"train.steps": 2.5}, ["train.steps"]),
    "steps is a boolean": ({"train.steps": True}, ["train.steps", "true"]),
    "batch of nothing": ({"batch.size": 0}, ["batch.size"]),
    "micro-batch of nothing": ({"batch.micro": 0}, ["batch.micro"]),
    "batch in two ways": ({"batch.global_tokens": 4096}, ["batch.size and batch.global_tokens"]),
    "max_length of one": ({"data.max_length": 1}, ["data.max_length"]),
    "stage four": ({"parallel.zero": 4}, ["parallel.zero"]),
    "no thread": ({"run.threads": 0}, ["run.threads"]),
    "negative seed": ({"run.seed": -1}, ["run.seed"]),
    "keeps nothing": ({"checkpoint.keep": 0}, ["checkpoint.keep"]),
    "interval of nothing": ({"train.eval_every": 0}, ["train.eval_every"]),
    "interval in weeks": ({"checkpoint.every": "2 weeks"}, ["checkpoint.every", "2 weeks"]),
    "smoothing of one": ({"loss.label_smoothing": 1.0}, ["loss.label_smoothing"]),
    "smoothing of several labels": (
        {"loss.label_smoothing": 0.1, "data.multi_label": True},
        ["loss.label_smoothing", "data.multi_label"],
    ),
    "classification that splits": ({"data.truncation": "split"}, ["data.truncation: split", "truncate, drop"]),
    "another version": ({"version": 2}, ["version"]),
    "padding to nothing": ({"batch.pad_to_multiple_of": 0}, ["batch.pad_to_multiple_of"]),
    "remote code that is not pinned": (
        {"model.trust_remote_code": True, "model.path": "some/model"},
        ["model.trust_remote_code", "model.revision"],
    ),
    "freeze is a word": ({"model.freeze": "*"}, ["model.freeze"]),
    "home of nobody": ({"run.dir": "~nobody-of-that-name/x"}, ["run.dir", "no such user's home"]),
    "variable that is not set": ({"data.train": "$NOWHERE_SET/x.jsonl"}, ["data.train", "NOWHERE_SET is not set"]),
    "lora of rank 0": ({"model.lora": {"r": 0}}, ["model.lora.r"]),
    "decay of layers beyond one": ({"optim.layer_decay": 1.5}, ["optim.layer_decay"]),
    "patience of nothing": (
        {"train.early_stopping": {"metric": "eval.loss", "patience": 0}},
        ["train.early_stopping.patience"],
    ),
}

# Texts that are no configuration at all.
TEXTS: dict[str, tuple[str, list[str]]] = {
    "empty file": ("", ["expected a mapping"]),
    "a list": ("- a\n- b\n", ["expected a mapping of sections, got list"]),
    "a word": ("classification", ["expected a mapping"]),
    "key twice": ("task: classification\ntask: causal_lm\n", ["'task' appears twice", "line 2"]),
    "tab": ("task:\tx\n\tmodel: y\n", ["not valid YAML", "line 1"]),
    "open bracket": ("task: [classification\n", ["not valid YAML"]),
    "template": ("task: {{ task }}\n", ["not valid YAML", "a key belongs"]),
    "bad indentation": ("task: a\n  model: b\n", ["not valid YAML", 'c.yaml", line 2']),
}

# Name -> what the changes are, given the folder; found by `validate` when the data is read.
DATA: dict[str, tuple] = {
    "no such file": (lambda t: {"data.train": str(t / "god.jsonl")}, ["god.jsonl: no such file", "good.jsonl"]),
    "no such folder": (lambda t: {"data.train": str(t / "no" / "x.jsonl")}, ["no such file", "does not exist either"]),
    "no training data": (lambda t: {"data.train": REMOVE}, ["data.train: no training data given"]),
    "empty file": (lambda t: {"data.train": rows(t, "e.jsonl", [])}, ["'train' is empty", "0 rows", "e.jsonl"]),
    "empty folder": (lambda t: {"data.train": _folder(t, "empty")}, ["empty", "no file of a known format", "jsonl"]),
    "blank rows": (
        lambda t: {"data.train": rows(t, "w.jsonl", [{"text": " ", "label": "a"}])},
        ["'train' is empty", "1 rows read from"],
    ),
    "unknown suffix": (lambda t: {"data.train": rows(t, "x.data", GOOD)}, ["x.data", "cannot tell the format"]),
    "unknown format": (
        lambda t: {"data.train": {"path": str(t / "good.jsonl"), "format": "docx"}},
        ["Unknown data format 'docx'", "jsonl"],
    ),
    "broken JSON": (lambda t: {"data.train": rows(t, "b.jsonl", [*GOOD, '{"text": '])}, ["b.jsonl:17: broken JSON"]),
    "row is a list": (lambda t: {"data.train": rows(t, "l.jsonl", [*GOOD, "[1]"])}, ["l.jsonl:17: expected a JSON"]),
    "key twice": (
        lambda t: {"data.train": rows(t, "k.jsonl", ['{"text": "a", "text": "b", "label": "c"}'])},
        ["k.jsonl:1: the key 'text' appears twice"],
    ),
    "no such column": (lambda t: {"data.text": "txt"}, ["good.jsonl:1: no column 'txt'", "Did you mean 'text'"]),
    "no label column": (lambda t: {"data.label": "class"}, ["good.jsonl:1: no column 'class'", "label"]),
    "text is a number": (
        lambda t: {"data.train": rows(t, "n.jsonl", [*GOOD, {"text": 3, "label": "a"}])},
        ["n.jsonl:17: column 'text' holds int, not text"],
    ),
    "text is missing": (
        lambda t: {"data.train": rows(t, "m.jsonl", [*GOOD, {"label": "a"}])},
        ["m.jsonl:17: no column 'text'"],
    ),
    "half a character": (
        lambda t: {"data.train": rows(t, "s.jsonl", ['{"text": "a \\ud83d", "label": "a"}'])},
        ["s.jsonl:1", "half a character"],
    ),
    "label is empty": (
        lambda t: {"data.train": rows(t, "le.jsonl", [*GOOD, {"text": "x", "label": " "}])},
        ["le.jsonl:17: the label is empty"],
    ),
    "label is null": (
        lambda t: {"data.train": rows(t, "ln.jsonl", [*GOOD, {"text": "x", "label": None}])},
        ["ln.jsonl:17: the label is empty"],
    ),
    "label is a list": (
        lambda t: {"data.train": rows(t, "ll.jsonl", [*GOOD, {"text": "x", "label": ["a"]}])},
        ["ll.jsonl:17: the label is a list", "multi_label: true"],
    ),
    "one label only": (lambda t: {"data.train": rows(t, "o.jsonl", GOOD[::2])}, ["same label 'apple'", "two"]),
    "label not seen in training": (
        lambda t: {"data.eval": rows(t, "u.jsonl", [{"text": "x", "label": "beer"}])},
        ["u.jsonl:1: label 'beer' does not occur", "Did you mean 'bear'"],
    ),
    "labels file is not there": (lambda t: {"data.labels": str(t / "names.txt")}, ["data.labels: no such file"]),
    "labels file is empty": (lambda t: {"data.labels": rows(t, "e.txt", [])}, ["data.labels", "e.txt is empty"]),
    "labels file names one twice": (
        lambda t: {"data.labels": rows(t, "two.txt", ["apple", "bear", "apple"])},
        ["two.txt names apple twice"],
    ),
    "label not in the labels file": (
        lambda t: {"data.labels": rows(t, "few.txt", ["apple", "pear"])},
        ["good.jsonl:2: label 'bear' does not occur in the labels file"],
    ),
    "too long": (
        lambda t: {"data.train": rows(t, "x.jsonl", [*GOOD, {"text": "long " * 99, "label": "bear"}])},
        ["1 of 17 texts", "max_length = 32", "x.jsonl:17", "truncate, drop"],
    ),
    "not UTF-8": (
        lambda t: {"data.train": binary(t, "latin.jsonl", b'{"text": "caf\xe9", "label": "a"}\n')},
        ["latin.jsonl: cannot be read as jsonl", "UTF-8"],
    ),
    "gzip cut short": (
        lambda t: {"data.train": binary(t, "cut.jsonl.gz", b"\x1f\x8b\x08\x00")},
        ["cut.jsonl.gz: cannot be read"],
    ),
    "not Parquet": (lambda t: {"data.train": binary(t, "x.parquet", b"PAR0")}, ["x.parquet: not a valid Parquet"]),
    "split of a file": (
        lambda t: {"data.train": {"path": str(t / "good.jsonl"), "split": "test"}},
        ["good.jsonl: split: test", "one file"],
    ),
    "a pipe": (lambda t: {"data.train": _pipe(t, "pipe.jsonl")}, ["pipe.jsonl", "pipe"]),
    "a folder of what the run writes": (
        lambda t: {"data.train": _folder(t, "own", "own/a.jsonl"), "run.dir": str(t / "own" / "run")},
        ["own holds run.dir"],
    ),
    "an evaluation set with a slash": (
        lambda t: {"data.eval": {"a/b": str(t / "good.jsonl")}},
        ["data.eval: 'a/b' is no name"],
    ),
    "best by what is not measured": (
        lambda t: {"data.eval": str(t / "good.jsonl"), "checkpoint.best_by": "eval.acuracy"},
        ["checkpoint.best_by: eval.acuracy is not measured", "Did you mean 'eval.accuracy'"],
    ),
    "best by a set that is not there": (
        lambda t: {"checkpoint.best_by": "eval.loss"},
        ["checkpoint.best_by", "data.eval"],
    ),
    "CSV without a header": (
        lambda t: {"data.train": binary(t, "h.csv", b"good morning,a\ngood night,b\n")},
        ["h.csv", "no column 'text'"],
    ),
    "CSV with semicolons": (
        lambda t: {"data.train": binary(t, "s.csv", b"text;label\nx, and so on;a\ny;b\n")},
        ["s.csv: has one column, 'text;label'", "separated by ;?", 'delimiter: ";"'],
    ),
    "CSV with tabs": (
        lambda t: {"data.train": binary(t, "t.csv", b"text\tlabel\nx\ta\n")},
        ["separated by tab?", r'delimiter: "\t"'],
    ),
    "TSV with commas": (
        lambda t: {"data.train": binary(t, "t.tsv", b"text,label\nx,a\n")},
        ["t.tsv: has one column", "separated by ,?"],
    ),
    "CSV with a cell too many": (
        lambda t: {"data.train": binary(t, "c.csv", b"text,label\nx,a\ny,b,c\n")},
        ["c.csv:3"],
    ),
}

# Found when the model is opened.
MODEL: dict[str, tuple] = {
    "no such model": (lambda t: {"model.path": str(t / "modell")}, ["modell: no such folder"]),
    "not a model": (lambda t: {"model.path": str(t)}, ["the folder holds no config.json"]),
    "a file": (lambda t: {"model.path": str(t / "good.jsonl")}, ["good.jsonl: is a file"]),
    "config.json is broken": (
        lambda t: {"model.path": _model(t, "broken", "{")},
        ["broken", "cannot be loaded"],
    ),
    "unknown architecture": (
        lambda t: {"model.path": _model(t, "odd", '{"model_type": "nothing_of_the_sort"}')},
        ["odd", "cannot be loaded", "nothing_of_the_sort"],
    ),
    "hub id out of reach": (lambda t: {"model.path": "nobody/nothing"}, ["nobody/nothing", "cannot be loaded"]),
    "no tokenizer": (lambda t: {"model.tokenizer": _folder(t, "none")}, ["tokenizer", "none"]),
    "beyond the model's positions": (lambda t: {"data.max_length": 4096}, ["data.max_length = 4096", "64 positions"]),
    "freeze that matches nothing": (lambda t: {"model.freeze": ["encoder.*.nothing"]}, ["model.freeze", "matches no"]),
    "freeze that leaves nothing": (lambda t: {"model.freeze": ["*"]}, ["model.freeze leaves nothing to train"]),
    "LoRA of what is not there": (
        lambda t: {"model.lora": {"targets": ["q_projj"]}},
        ["model.lora.targets: 'q_projj' matches no linear layer"],
    ),
    "an encoder that is to generate": (
        lambda t: {"task": "causal_lm", "data.label": REMOVE, "data.packing": "none", "data.truncation": "split"},
        ["model path"],
    ),
    "DeepSpeed key that follows": (
        lambda t: {"parallel.deepspeed": {"optimizer": {}}},
        ["parallel.deepspeed: 'optimizer' follows from"],
    ),
    "DeepSpeed key that is unknown": (
        lambda t: {"parallel.deepspeed": {"zero_optimisation": {}}},
        ["DeepSpeed knows no zero_optimisation", "Did you mean 'zero_optimization'"],
    ),
    "DeepSpeed file that is not there": (
        lambda t: {"parallel.deepspeed": str(t / "ds.json")},
        ["parallel.deepspeed", "ds.json"],
    ),
    "CUDA where there is none": (lambda t: {"run.device": "cuda"}, ["run.device: cuda", "no CUDA device"]),
}

# Commands by themselves.
COMMANDS: dict[str, tuple] = {
    "unknown verb": (lambda t: ["trian"], 1, ["trian: no such verb", "Did you mean 'train'"]),
    "no verb": (lambda t: [], 2, []),
    "unknown option": (lambda t: ["train", "--fast"], 2, ["--fast"]),
    "no configuration": (lambda t: ["train"], 2, ["config"]),
    "configuration is not there": (lambda t: ["train", t / "c.yml"], 1, ["c.yml: no such configuration file"]),
    "override without a value": (lambda t: ["train", t / "c.yaml", "optim.lr"], 1, ["'optim.lr' is not of the form"]),
    "override of nothing": (lambda t: ["train", t / "c.yaml", "=3"], 1, ["'=3' is not of the form"]),
    "override of a value's part": (lambda t: ["train", t / "c.yaml", "task.name=x"], 1, ["'task.name=x'", "section"]),
    "override that is no YAML": (lambda t: ["train", t / "c.yaml", "optim.lr=[1"], 1, ["not valid YAML"]),
    "override of an unknown key": (lambda t: ["train", t / "c.yaml", "optim.ir=1"], 1, ["optim.ir: unknown key"]),
    "settings as options": (
        lambda t: ["train", t / "c.yaml", "--optim.lr=5e-5"],
        1,
        ["--optim.lr=5e-5: a setting is given without --", "optim.lr=5e-5"],
    ),
    "settings as two options": (lambda t: ["train", t / "c.yaml", "--optim.lr", "5e-5"], 1, ["example: optim.lr=5e-5"]),
    "another trainer's option": (
        lambda t: ["train", t / "c.yaml", "--learning_rate", "5e-5"],
        1,
        ["no such option: --learning_rate. Here it is optim.lr."],
    ),
    "another trainer's option of launch": (
        lambda t: ["launch", "train", t / "c.yaml", "--num-train-epochs=3"],
        1,
        ["Here it is train.epochs."],
    ),
    "a folder as configuration": (lambda t: ["validate", t], 1, ["is a folder, not a configuration file", "c.yaml"]),
    "a run as configuration": (
        lambda t: ["train", _run(t, "old")],
        1,
        ["old: is a folder", "fastft resume", "config.yaml is its configuration"],
    ),
    "eval of nothing": (
        lambda t: ["eval", t / "nothing", _run(t, "old")][:2],
        1,
        ["nothing: not a run folder (it is not there)", "Runs near it", "old"],
    ),
    "eval of a configuration that is not there": (
        lambda t: ["eval", t / "d.yaml"],
        1,
        ["d.yaml: no such configuration file", "Did you mean 'c.yaml'"],
    ),
    "eval of a run without a model": (
        lambda t: ["eval", _run(t, "old")],
        1,
        ["old: holds no exported model", "fastft resume", "fastft export"],
    ),
    "trace of nothing": (lambda t: ["trace", t / "nothing"], 1, ["nothing: not a run folder (it is not there)"]),
    "resume of a folder of runs": (
        lambda t: ["resume", Path(_run(t, "old")).parent],
        1,
        ["not a run folder (no config.yaml)", "Runs near it", "old"],
    ),
    "launch's options after train": (
        lambda t: ["launch", "train", t / "c.yaml", "--nproc", 2],
        1,
        ["--nproc is an option of launch: options go before train", "fastft launch --nproc 2 train"],
    ),
    "resume of nothing": (lambda t: ["resume", t / "nothing"], 1, ["nothing: not a run folder"]),
    "export of nothing": (lambda t: ["export", t / "nothing", t / "out"], 1, ["nothing: not a run folder"]),
    "replay of nothing": (lambda t: ["replay", t / "nothing", "--step", "1"], 1, ["nothing"]),
    "predict of nothing": (lambda t: ["predict", t / "nothing", "--text", "x"], 1, ["nothing: no such folder"]),
    "predict without a text": (lambda t: ["predict", "m"], 1, ["Give either a data file or --text"]),
    "predict into a folder": (lambda t: ["predict", "m", "--text", "x", "--out", t], 1, ["is a folder"]),
    "launch of nothing": (lambda t: ["launch", "evaluate", "x"], 1, ["starts `train CONFIG`, `resume RUN_DIR`"]),
    "launch without hosts": (
        lambda t: ["launch", "--hostfile", t / "hosts", "train", t / "c.yaml"],
        1,
        ["hosts: no such host file"],
    ),
    "launch in two ways": (
        lambda t: ["launch", "--hostfile", t / "good.jsonl", "--nproc", 2, "train", t / "c.yaml"],
        1,
        ["--hostfile and --nproc exclude each other"],
    ),
    "launch with a host file that is none": (
        lambda t: ["launch", "--hostfile", t / "good.jsonl", "train", t / "c.yaml"],
        1,
        ["good.jsonl:1: expected `name slots=N`"],
    ),
    "launch on no rank": (lambda t: ["launch", "--nproc", 0, "train", t / "c.yaml"], 2, ["--nproc"]),
    "plan of nothing": (lambda t: ["plan"], 1, ["Give either a model (folder or hub id) or --params"]),
    "plan on unknown hardware": (
        lambda t: ["plan", "--params", "7e9", "--hardware", "h1000"],
        1,
        ["--hardware h1000: unknown", "h100"],
    ),
    "plan on no GPU": (lambda t: ["plan", "--params", "7e9", "--gpus", 0], 1, ["--gpus 0: must be more than 0"]),
}


def _folder(t: Path, name: str, *files: str) -> str:
    (t / name).mkdir(exist_ok=True)
    for file in files:
        rows(t, file, GOOD)
    return str(t / name)


def _run(t: Path, name: str) -> str:
    """A folder that looks like an interrupted run's, of the configuration beside it."""
    (t / name).mkdir()
    (t / name / "config.yaml").write_text((t / "c.yaml").read_text())
    (t / name / "metrics.jsonl").touch()
    return str(t / name)


def _pipe(t: Path, name: str) -> str:
    os.mkfifo(t / name)
    return str(t / name)


def _model(t: Path, name: str, config: str) -> str:
    (t / name).mkdir()
    (t / name / "config.json").write_text(config)
    return str(t / name)


def check(code: int, err: str, parts: list[str], folder: Path, expected: int = 1) -> None:
    assert code == expected, err
    assert not [part for part in parts if part not in err], err
    assert "Traceback" not in err and len(err.splitlines()) <= 20, err
    assert not (folder / "run" / "metrics.jsonl").exists() and not (folder / "run" / "model").exists()


def test_there_are_enough():
    assert sum(map(len, (CONFIG, TEXTS, DATA, MODEL, COMMANDS))) + 6 >= 120


@pytest.mark.parametrize("name", CONFIG)
def test_configuration(place, tmp_path, capsys, name):
    changes, parts = CONFIG[name]
    path = launch.write_config(tmp_path / "c.yaml", changed(place[1], changes))
    code, err = said(capsys, "train", path)
    check(code, err, ["c.yaml", *parts], tmp_path)


@pytest.mark.parametrize("name", TEXTS)
def test_no_configuration(tmp_path, capsys, name):
    text, parts = TEXTS[name]
    (tmp_path / "c.yaml").write_text(text)
    code, err = said(capsys, "validate", tmp_path / "c.yaml")
    check(code, err, ["c.yaml", *parts], tmp_path)
    assert "<unicode string>" not in err


@pytest.mark.parametrize(("table", "name"), [*(("data", n) for n in DATA), *(("model", n) for n in MODEL)])
def test_data_and_model(place, tmp_path, capsys, table, name):
    make, parts = {"data": DATA, "model": MODEL}[table][name]
    rows(tmp_path, "good.jsonl", GOOD)
    own = {"data.train": str(tmp_path / "good.jsonl"), "run.dir": str(tmp_path / "run")}
    path = launch.write_config(tmp_path / "c.yaml", changed(place[1], {**own, **make(tmp_path)}))
    code, err = said(capsys, "validate", path)
    check(code, err, parts, tmp_path)


@pytest.mark.parametrize("name", COMMANDS)
def test_command(place, tmp_path, capsys, name):
    make, expected, parts = COMMANDS[name]
    rows(tmp_path, "good.jsonl", GOOD)
    launch.write_config(tmp_path / "c.yaml", place[1])
    code, err = said(capsys, *make(tmp_path))
    check(code, err, parts, tmp_path, expected)


def test_what_the_file_says_is_told_before_torch_is_imported(place, tmp_path):
    """All mistakes of configurations in one process, which has not imported torch at its end."""
    paths = [
        launch.write_config(tmp_path / f"{i}.yaml", changed(place[1], c)) for i, (c, _) in enumerate(CONFIG.values())
    ]
    for i, (text, _) in enumerate(TEXTS.values()):
        paths.append(tmp_path / f"t{i}.yaml")
        paths[-1].write_text(text)
    code = """
import sys
from fastft.cli.main import main
for path in sys.argv[1:]:
    try:
        main(["train", path])
    except SystemExit as e:
        assert e.code == 1, path
    assert "torch" not in sys.modules, path
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


# -- environment, disk, signals: real processes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("env", "part"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2"),
    ],
)
def test_environment(place, tmp_path, env, part):
    config = changed(place[1], {"run.dir": str(tmp_path / "run")})
    process = launch.start_python(["-m", "fastft", "train", launch.write_config(tmp_path / "c.yaml", config)], env)
    output = launch.finish(process, 90)
    check(process.returncode, output, [part], tmp_path)


def test_a_port_that_is_taken(place, tmp_path):
    import socket

    config = launch.write_config(tmp_path / "c.yaml", changed(place[1], {"run.dir": str(tmp_path / "run")}))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, output = launch.fastft("launch", "--nproc", 2, "--master-port", port, "train", config, check=False)
    check(code, output, [f"--master-port {port}", "another process listens"], tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a disk of a test's own needs root")
def test_a_disk_that_is_full(place, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    many = rows(
        tmp_path,
        "many.jsonl",
        [{"text": f"{row['text']} {i}", "label": row["label"]} for i in range(300) for row in GOOD],
    )
    config = changed(
        place[1], {"data.train": many, "data.cache": str(small / "cache"), "run.dir": str(tmp_path / "run")}
    )
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=60k", "tmpfs", str(small)], check=True)
    try:
        code, output = launch.fastft("validate", launch.write_config(tmp_path / "c.yaml", config), check=False)
    finally:
        subprocess.run(["umount", str(small)], check=True)
    check(code, output, [str(small / "cache"), "space", "data.cache"], tmp_path)


def test_a_signal_while_data_is_read(place, tmp_path):
    """SIGINT before the first step: 130, nothing of a run is there."""
    import signal
    import time

    config = changed(
        place[1], {"run.dir": str(tmp_path / "run"), "data.train": rows(tmp_path, "n.jsonl", GOOD * 20000)}
    )
    process = launch.start_python(["-m", "fastft", "train", launch.write_config(tmp_path / "c.yaml", config)], {})
    deadline = time.monotonic() + 60
    while not list((tmp_path / "run").glob("prepared/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    while process.poll() is None and time.monotonic() < deadline:
        os.kill(process.pid, signal.SIGINT)
        time.sleep(2.0)  # again where Python lost the first one, raised in a finalizer
    output = launch.finish(process, 60)
    check(process.returncode, output, [], tmp_path, 130)


def test_the_good_one_is_good(place, tmp_path, capsys):
    """None of the above is a mistake of the configuration that all are made from."""
    path = launch.write_config(tmp_path / "c.yaml", changed(place[1], {"run.dir": str(tmp_path / "run")}))
    assert said(capsys, "validate", path)[0] == 0
