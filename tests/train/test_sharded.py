"""ZeRO-3: each rank loads its part of the weights alone, and they are exported one by one."""

import copy
import json
import shlex

import pytest
import torch
import transformers
from safetensors.torch import load_file

import launch
from fastft import track

RUNS = launch.ROOT / "tests" / "train" / "runs.py"


def saved(config: dict, folder, dtype: str = "float32", **changes) -> dict:
    """The configuration, from a copy of its model in another dtype."""
    path = config["model"]["path"]
    kind = transformers.AutoModelForCausalLM if config["task"] == "causal_lm" else transformers.AutoModel
    model = kind.from_pretrained(path, dtype=getattr(torch, dtype))
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(path).save_pretrained(folder)
    found = copy.deepcopy(config)
    found["model"] = {"path": str(folder)}
    return found


def test_shards_are_those_of_a_model_that_was_loaded_whole(lm_config, classification_config, tmp_path):
    """Bit for bit, of files in any dtype; with a new head, adapters, new rows, frozen weights, random ones."""
    lm_config["optim"] = {"lr": 1e-3}
    lm_config["parallel"] = classification_config["parallel"] = {"zero": 3}
    lm_config["data"].pop("eval")
    classification_config["data"].pop("eval", None)
    classification_config["data"]["max_length"] = 32
    stored = {dtype: saved(lm_config, tmp_path / dtype, dtype) for dtype in ("float32", "bfloat16", "float16")}
    cases = {
        "fp32": stored["float32"],
        "fp32_of_bf16": stored["bfloat16"],
        "fp32_of_fp16": stored["float16"],
        "bf16_of_fp32": {**stored["float32"], "model": {**stored["float32"]["model"], "dtype": "bf16"}},
        "random": {**lm_config, "model": {**lm_config["model"], "init": "random"}},
        "adapters": {**stored["bfloat16"], "model": {**stored["bfloat16"]["model"], "lora": {"r": 4}}},
        "frozen": {**stored["bfloat16"], "model": {**stored["bfloat16"]["model"], "freeze": ["*embed_tokens*"]}},
        "head": saved(classification_config, tmp_path / "bert", "bfloat16"),
        "bf16_head": saved(classification_config, tmp_path / "bert32"),
        "random_head": {**classification_config, "model": {**classification_config["model"], "init": "random"}},
    }
    cases["bf16_head"]["model"] |= {"dtype": "bf16", "new_head": True}
    merged = {"init": "random", "dtype": "bf16", "lora": {"r": 16, "export": "merged"}}
    cases["bf16_random_adapters"] = {**lm_config, "model": {**lm_config["model"], **merged}}
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm_config["model"]["path"])
    tokenizer.add_tokens([f"<{i}>" for i in range(5)])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = {"resize_embeddings": True, "tokenizer": str(tmp_path / "tokenizer")}
    for name in ("bfloat16", "float32"):
        cases[f"rows_{name}"] = {**stored[name], "model": {**stored[name]["model"], **rows}}
    paths = []
    for name, made in cases.items():
        made = copy.deepcopy(made)
        made["run"]["dir"] = str(tmp_path / f"run-{name}")
        paths.append(launch.write_config(tmp_path / f"{name}.yaml", made))
    launch.ranks(2, [RUNS, "shards", tmp_path, *paths])
    for path in paths:
        found = json.loads(path.with_suffix(".json").read_text())
        assert not found["wrong"], (path.stem, found["wrong"])
        assert found["loss"] == pytest.approx(found["whole"], rel=1e-3 if "bf16" in path.stem[:4] else 1e-6), path.stem


@pytest.mark.parametrize("world", [1, 2])
def test_an_export_of_shards_is_that_of_a_checkpoint(lm_config, tmp_path, world):
    """The folder that a run leaves, gathered weight by weight, and `fastft export` of its last checkpoint."""
    lm_config["parallel"] = {"zero": 3}
    lm_config["train"] = {"steps": 2}
    lm_config["checkpoint"] = {"every": 2}
    launch.ranks(world, ["-m", "fastft", "train", launch.write_config(tmp_path / "c.yaml", lm_config)])
    run = tmp_path / "run"
    assert track.read(run)[-1]["kind"] == "end"
    launch.fastft("export", run, tmp_path / "exported")
    a, b = (load_file(folder / "model.safetensors") for folder in (run / "model", tmp_path / "exported"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert (run / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "exported" / "model.safetensors"
    ).read_bytes()
    transformers.AutoModelForCausalLM.from_pretrained(run / "model")


def test_the_commands_of_the_page(classification_config, no_dropout, tmp_path, monkeypatch):
    """docs/large-models.md, on a small model."""
    page = (launch.ROOT / "docs" / "large-models.md").read_text()
    monkeypatch.chdir(tmp_path)
    classification_config["data"]["eval"] = {"test": str(tmp_path / "test.jsonl")}
    classification_config["checkpoint"] = {"every": 2}
    classification_config |= {"train": {"steps": 2}, "run": classification_config["run"] | {"dir": "runs/my"}}
    launch.write_config(tmp_path / "my.yaml", classification_config)
    launch.write_config(tmp_path / "documents.yaml", no_dropout)
    commands = [line for block in page.split("```bash\n")[1:] for line in block.partition("```")[0].splitlines()]
    assert len(commands) == 11
    for command in commands:
        name, *arguments = shlex.split(command, comments=True)
        assert name == "fastft"
        launch.fastft(*arguments)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 12
    assert (tmp_path / "exported" / "model.safetensors").is_file()
