"""The command line as a user meets it: every mistake is one screen with what to do, and a code that is not 0."""

import json
import re

import pytest
import yaml

import launch


def run(*arguments):
    return launch.fastft(*arguments, check=False)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, tiny_bert):
    """A trained classifier: (configuration path, run folder)."""
    folder = tmp_path_factory.mktemp("classifier")
    rows = [{"text": f"{w} number {i}", "label": c} for i in range(16) for c, w in (("a", "apple"), ("b", "bear"))]
    for name, part in (("train", rows[:24]), ("test", rows[24:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in part))
    config = {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": str(folder / "train.jsonl"), "eval": {"test": str(folder / "test.jsonl")}},
        "batch": {"size": 8},
        "optim": {"lr": 3e-3},
        "train": {"epochs": 10},
        "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1},
    }
    path = launch.write_config(folder / "c.yaml", config)
    launch.fastft("train", path)
    return path, folder / "run"


def test_train_eval_predict_agree(classifier, tmp_path):
    path, folder = classifier
    _, output = run("eval", folder, "--json")
    metrics = json.loads(output.strip().splitlines()[-1])["test"]
    assert metrics["accuracy"] == 1.0 and metrics["examples"] == 8
    code, _ = run("predict", folder, path.parent / "test.jsonl", "--out", tmp_path / "p.jsonl", "--batch-size", "3")
    records = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    truth = [json.loads(line)["label"] for line in (path.parent / "test.jsonl").read_text().splitlines()]
    assert code == 0 and [r["label"] for r in records] == truth
    assert all(abs(sum(r["scores"].values()) - 1) < 1e-5 for r in records)


def test_predict_one_text(classifier):
    _, output = run("predict", classifier[1], "--text", "apple number 3")
    assert json.loads(output.strip().splitlines()[-1])["label"] == "a"


def test_generate(tiny_llama):
    _, output = run("predict", tiny_llama, "--text", "The class", "--max-new-tokens", "5")
    assert json.loads(output.strip().splitlines()[-1])["text"] == "The class"
    code, output = run("predict", tiny_llama, "--text", "The class", "--max-new-tokens", "500")
    assert code == 1 and "limit of 256" in output


def test_validate_reports_counts(classifier):
    code, output = run("validate", classifier[0], "--json")
    report = json.loads(output.strip().splitlines()[-1])
    assert code == 0 and report["splits"]["train"]["counts"]["rows"] == 24 and report["steps"] == 30
    assert run("validate", classifier[0])[0] == 0


def test_schema_is_json_schema():
    code, output = run("config", "schema")
    assert code == 0 and json.loads(output)["properties"]["optim"]


def test_the_run_tells_what_it_was(classifier):
    records = [json.loads(line) for line in (classifier[1] / "metrics.jsonl").read_text().splitlines()]
    kinds = [r["kind"] for r in records]
    assert kinds[0] == "run" and kinds[-1] == "end" and {"train", "eval", "checkpoint", "backends"} <= set(kinds)
    first = records[0]
    assert (
        first["versions"]["torch"] and first["config"]["optim"]["lr"] == 3e-3 and first["data"]["train"]["rows"] == 24
    )
    train = [r for r in records if r["kind"] == "train"]
    assert all(r["tokens_per_second"] > 0 and r["grad_norm"] > 0 and 0 <= r["padding"] < 1 for r in train)
    assert yaml.safe_load((classifier[1] / "config.yaml").read_text())["optim"]["lr"] == 3e-3


def broken(tmp_path, classifier, **changes):
    raw = yaml.safe_load(classifier[0].read_text())
    raw["run"]["dir"] = str(tmp_path / "run")
    raw["data"]["max_length"] = 64
    for key, value in changes.items():
        section, field = key.split("__")
        raw.setdefault(section, {})[field] = value
    return launch.write_config(tmp_path / "broken.yaml", raw)


def file(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    return str(tmp_path / name)


GOOD = '{"text": "apple x", "label": "a"}\n{"text": "bear y", "label": "b"}\n'
MISTAKES = {
    "unknown key": (lambda t: {"optim__learning_rate": 1}, ["optim.learning_rate", "unknown key"]),
    "wrong type": (lambda t: {"optim__lr": "fast"}, ["optim.lr", "'fast'"]),
    "missing file": (lambda t: {"data__train": str(t / "nothing.jsonl")}, ["nothing.jsonl", "no such file"]),
    "broken JSON": (lambda t: {"data__train": file(t, "b.jsonl", GOOD + '{"text": \n')}, ["b.jsonl:3", "broken JSON"]),
    "empty data": (lambda t: {"data__train": file(t, "e.jsonl", "")}, ["is empty", "0 rows"]),
    "unseen label": (
        lambda t: {"data__eval": file(t, "l.jsonl", '{"text": "x", "label": "zebra"}\n')},
        ["l.jsonl:1", "zebra", "training data"],
    ),
    "too long": (
        lambda t: {"data__train": file(t, "x.jsonl", GOOD + '{"text": "%s", "label": "a"}\n' % ("long " * 200))},
        ["1 of 3 texts", "64 tokens", "x.jsonl:3", "truncate, drop"],
    ),
    "beyond the model": (lambda t: {"data__max_length": 4096}, ["data.max_length = 4096", "limit of 64"]),
    "no such model": (lambda t: {"model__path": str(t / "modell")}, ["modell", "no such folder"]),
    "not a model": (lambda t: {"model__path": str(t)}, ["no config.json"]),
    "unreachable hub id": (lambda t: {"model__path": "nobody/nothing"}, ["nobody/nothing", "cannot be loaded"]),
    "unknown task": (lambda t: {}, ["unknown task 'clasification'", "classification"]),
    "owned DeepSpeed key": (lambda t: {"parallel__deepspeed": {"optimizer": {}}}, ["'optimizer'"]),
}


@pytest.mark.parametrize(
    "name, verb", [(name, "train") for name in MISTAKES] + [("unseen label", "validate"), ("no such model", "validate")]
)
def test_mistakes_are_one_screen(classifier, tmp_path, name, verb):
    changes, parts = MISTAKES[name]
    path = broken(tmp_path, classifier, **changes(tmp_path))
    if name == "unknown task":
        path.write_text(path.read_text().replace("task: classification", "task: clasification"))
    code, output = run(verb, path)
    assert code == 1, output
    for part in parts:
        assert part in output
    assert "Traceback" not in output and len(output.splitlines()) <= 24
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_model_of_the_wrong_kind(classifier, tmp_path, tiny_bert, corpus):
    raw = yaml.safe_load(classifier[0].read_text())
    raw |= {
        "task": "causal_lm",
        "data": {"train": str(corpus / "train.jsonl"), "truncation": "split", "max_length": 64},
    }
    raw["run"]["dir"] = str(tmp_path / "run")
    code, output = run("train", launch.write_config(tmp_path / "c.yaml", raw))
    assert code == 1 and "Traceback" not in output and re.search(r"missing|position_ids", output)


def test_eval_needs_a_trained_classifier(classifier, tiny_bert):
    code, output = run("eval", classifier[0], f"model.path={tiny_bert}")
    assert code == 1 and "not a trained classifier" in output and "Traceback" not in output


def test_help_takes_next_to_no_time():
    """CPU time beside that of an interpreter that does nothing, in one run; medians, for either may be disturbed."""
    import resource
    import statistics
    import subprocess
    import sys

    def seconds(arguments: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, cwd=launch.ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    rounds = [(seconds(["-c", "pass"]), seconds(["-m", "fastft", "--help"])) for _ in range(7)]
    nothing, help_text = (statistics.median(part) for part in zip(*rounds, strict=True))
    assert help_text < 4 * nothing


def test_export_in_another_dtype(classifier, tmp_path):
    """The folder is read back in the dtype that was asked for, and its config says so."""
    import torch
    from transformers import AutoModelForSequenceClassification

    code, output = run("export", classifier[1], tmp_path / "out", "--dtype", "bf16")
    assert code == 0, output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_several_texts(classifier):
    _, output = run("predict", classifier[1], "--text", "apple number 3", "--text", "bear number 4")
    assert [json.loads(line)["label"] for line in output.splitlines() if line.startswith("{")] == ["a", "b"]


def test_a_model_is_exported_in_the_dtype_that_it_came_in(classifier, tmp_path, tiny_bert):
    """A bf16 folder that is trained in fp32; --dtype fp32 gives what was trained."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(tiny_bert, dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "m")
    path = broken(tmp_path, classifier, model__path=str(tmp_path / "m"), train__steps=2, train__epochs=None)
    code, output = run("train", path)
    assert code == 0, output
    short = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {t.dtype for t in short.values()} == {torch.bfloat16}
    assert run("export", tmp_path / "run", tmp_path / "whole", "--dtype", "fp32")[0] == 0
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert all(t.dtype == torch.float32 and torch.equal(t.bfloat16(), short[n]) for n, t in whole.items())


def test_an_output_is_not_written_onto_data(classifier):
    data = classifier[0].parent / "test.jsonl"
    before = data.read_text()
    for command in (("predict", classifier[1], data), ("eval", classifier[1])):
        code, output = run(*command, "--out", data, "--overwrite")
        assert code == 1 and "is data that is read" in output and data.read_text() == before


def test_an_adapter_over_a_head_of_another_size(classifier, tmp_path, tiny_bert):
    """The adapter brings its own head: evaluation and predictions need nothing said."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=5)
    model.save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "m")
    changes = {"model__path": str(tmp_path / "m"), "model__new_head": True, "model__lora": {"r": 4}}
    path = broken(tmp_path, classifier, **changes, train__steps=2, train__epochs=None)
    code, output = run("train", path)
    assert code == 0, output
    assert run("eval", tmp_path / "run")[0] == 0
    _, output = run("predict", tmp_path / "run", "--text", "apple")
    assert json.loads(output.strip().splitlines()[-1])["label"] in "ab"
