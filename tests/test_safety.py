"""What a hostile reviewer lost or got wrong in silence, once: none of it may come back."""

import json

import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import launch
from fastft import cli
from fastft import config as configuration
from fastft.errors import UserError
from fastft.tasks import TASKS


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bert):
    """A classifier after 4 steps: (configuration, run folder)."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"text": f"{w} number {i}", "label": c} for i in range(16) for c, w in (("a", "apple"), ("b", "bear"))]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = {"task": "classification", "model": {"path": str(tiny_bert)}, "data": {"train": str(folder / "train.jsonl"), "max_length": 32}, "batch": {"size": 8},
              "train": {"steps": 4}, "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1}}
    path = launch.write_config(folder / "c.yaml", config)
    launch.fastft("train", path)
    return path, folder / "run"


def refused(*arguments) -> str:
    code, output = launch.fastft(*arguments, check=False)
    assert code == 1 and "Traceback" not in output and len(output.splitlines()) <= 24, output
    return output


def test_a_run_takes_nobody_elses_files(trained, tmp_path, tiny_bert):
    """run.dir with a model/ and a config.yaml that no run wrote: refused, also with --overwrite, and untouched."""
    project = tmp_path / "project"
    transformers.AutoModel.from_pretrained(tiny_bert).save_pretrained(project / "model")
    (project / "config.yaml").write_text("mine: true  # a comment\n")
    for more in ([], ["--overwrite"]):
        assert "not the folder of a run" in refused("train", trained[0], f"run.dir={project}", *more)
    assert (project / "config.yaml").read_text() == "mine: true  # a comment\n" and (project / "model" / "model.safetensors").exists()


def test_overwrite_keeps_the_old_run_until_the_new_one_is_done(trained, tmp_path):
    config = yaml.safe_load(trained[0].read_text())
    config["run"]["dir"] = str(tmp_path / "run")
    config["train"]["steps"] = 1
    path = launch.write_config(tmp_path / "c.yaml", config)
    launch.fastft("train", path)
    assert "lies in run.dir" in refused("train", path, f"model.path={tmp_path}/run/model", "--overwrite")
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    refused("train", path, "--overwrite", "optim.lr=1e38", "train.steps=30", "train.max_skipped=0")
    assert (tmp_path / "run" / "model.old" / "model.safetensors").read_bytes() == before
    launch.fastft("train", path, "--overwrite")
    assert not list((tmp_path / "run").glob("*.old"))


def test_export_has_every_weight_of_a_sharded_run_with_frozen_ones(lm_config, tmp_path):
    lm_config["train"] = {"steps": 1}
    lm_config["parallel"] = {"zero": 1}
    lm_config["model"]["freeze"] = ["*embed*"]
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", lm_config))
    launch.fastft("export", lm_config["run"]["dir"], tmp_path / "exported")
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    whole = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert exported.keys() == whole.keys() and all(torch.equal(exported[k], whole[k]) for k in whole)


def classification(config: dict, **data):
    config["data"] |= data
    c = configuration.validate(config)
    return TASKS.get(c.task)(c)


def test_names_that_are_numbers_are_never_taken_for_indices(classification_config, tmp_path):
    (tmp_path / "stars.txt").write_text("1\n2\n3\n")
    (tmp_path / "stars.jsonl").write_text("".join(json.dumps({"text": "x", "label": i}) + "\n" for i in (1, 2, 3)))
    task = classification(classification_config, train=str(tmp_path / "stars.jsonl"), labels=str(tmp_path / "stars.txt"))
    assert np.asarray(task.train_split().data["labels"]).tolist() == [0, 1, 2]
    (tmp_path / "zero.jsonl").write_text(json.dumps({"text": "x", "label": 0}) + "\n")
    with pytest.raises(UserError, match="label '0' does not occur in the labels file"):
        classification(classification_config, train=str(tmp_path / "zero.jsonl")).train_split()


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"text": "x \\ud800", "label": "a"}', "half a character"),
        ('{"text": "x", "label": NaN}', "the label is empty"),
        ('{"text": "x", "label": "a", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ('{"text": 3, "label": "a"}', "holds int, not text"),
    ],
)
def test_rows_that_no_tokenizer_takes(classification_config, tmp_path, row, message):
    (tmp_path / "odd.jsonl").write_text('{"text": "x", "label": "b"}\n' + row + "\n")
    with pytest.raises(UserError, match=message) as error:
        classification(classification_config, train=str(tmp_path / "odd.jsonl")).train_split()
    assert "odd.jsonl:2" in str(error.value)


def test_odd_digits_are_names(classification_config, tmp_path):
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps({"text": "x", "label": v}) + "\n" for v in ("1", "²", "--5")))
    assert classification(classification_config, train=str(tmp_path / "odd.jsonl")).train_split().data.meta["labels"] == ["--5", "1", "²"]


def test_settings_that_would_do_nothing_are_refused(classification_config):
    for change, message in (({"implementation": "linear_cross_entropy"}, "for language models"), ({"label_smoothing": 0.1}, "of its own")):
        config = {**classification_config, "loss": change, "data": {**classification_config["data"], "multi_label": "label_smoothing" in change}}
        with pytest.raises(UserError, match=message):
            classification(config)


def test_an_encoder_without_its_weights_is_no_pretrained_model(trained, tmp_path, tiny_bert):
    model = transformers.AutoModel.from_pretrained(tiny_bert)
    model.save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "encoder" not in k or ".dense." not in k}, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    assert "weights of" in refused("validate", trained[0], f"model.path={tmp_path}/bert")
    (tmp_path / "bert" / "model.safetensors").write_bytes(b"garbage" * 100)
    assert "cannot be loaded" in refused("validate", trained[0], f"model.path={tmp_path}/bert")


def test_resume_refuses_what_would_not_be_the_rest_of_the_run(trained):
    for change in ("batch.size=4", "data.seed=99", "optim.state_dtype=int8", "parallel.zero=1", "model.dtype=bf16"):
        key = change.partition("=")[0]
        assert f"was written with {key} = " in refused("resume", trained[1], "train.steps=6", change)
    assert "is at step 4" in refused("resume", trained[1], "train.steps=2")


def in_process(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return stopped.value.code or 0, captured.out + captured.err


def test_predict_keeps_the_file_that_is_there(trained, tmp_path, capsys):
    keep = tmp_path / "keep.jsonl"
    keep.write_text("mine\n")
    code, output = in_process(capsys, "predict", trained[1] / "model", tmp_path / "nothing.jsonl", "--out", keep)
    assert code == 1 and keep.read_text() == "mine\n" and "no such file" in output
    assert in_process(capsys, "predict", trained[1], "--text", "x", "--batch-size", "0")[0] == 2
    code, output = in_process(capsys, "predict", trained[1], "--text", " ")
    assert code == 1 and "the text is empty" in output
    code, output = in_process(capsys, "predict", trained[1], "--text", "x", "--out", "/proc/nothing/x.jsonl")
    assert code == 1 and "/proc/nothing" in output


def test_a_run_folder_may_have_any_name(trained, tmp_path, capsys):
    import shutil

    shutil.copytree(trained[1], tmp_path / "a #1")
    code, output = in_process(capsys, "eval", tmp_path / "a #1", f"data.eval={trained[0].parent}/train.jsonl")
    assert code == 0 and "accuracy" in output


def test_small_mistakes(trained, tmp_path, capsys):
    assert "Known: ." not in in_process(capsys, "validate", tmp_path / "nothing.yaml")[1]
    code, output = in_process(capsys, "validate", trained[0], "parallel.deepspeed={zero_optimization: {stagee: 1}}")
    assert code == 1 and "stagee" in output
    code, output = in_process(capsys, "validate", trained[0], "run.dir=/proc/foo")
    assert code == 1 and "/proc/foo" in output
    assert configuration.validate({"task": "causal_lm", "model": {"path": "x"}, "loss": None, "data": {"eval": None}}).loss.z_loss == 0
