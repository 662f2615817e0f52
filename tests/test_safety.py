"""What a hostile reviewer lost or got wrong in silence, once: none of it may come back."""

import json
import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import launch
from fastft import assemble, cli
from fastft import config as configuration
from fastft.data import formats, prepared
from fastft.errors import UserError
from fastft.files import replacing
from fastft.ops import cross_entropy
from fastft.rooms import TASKS


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bert):
    """A classifier after 4 steps: (configuration, run folder)."""
    folder = tmp_path_factory.mktemp("trained")
    rows = [{"text": f"{w} number {i}", "label": c} for i in range(16) for c, w in (("a", "apple"), ("b", "bear"))]
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": str(folder / "train.jsonl"), "max_length": 32},
        "batch": {"size": 8},
        "train": {"steps": 4},
        "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1},
    }
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
    assert (project / "config.yaml").read_text() == "mine: true  # a comment\n" and (
        project / "model" / "model.safetensors"
    ).exists()


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
    task = classification(
        classification_config, train=str(tmp_path / "stars.jsonl"), labels=str(tmp_path / "stars.txt")
    )
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
    (tmp_path / "odd.jsonl").write_text(
        "".join(json.dumps({"text": "x", "label": v}) + "\n" for v in ("1", "²", "--5"))
    )
    assert classification(classification_config, train=str(tmp_path / "odd.jsonl")).train_split().data.meta[
        "labels"
    ] == ["--5", "1", "²"]


def test_settings_that_would_do_nothing_are_refused(classification_config):
    for change, message in (
        ({"implementation": "linear_cross_entropy"}, "loss.implementation: unknown key"),
        ({"label_smoothing": 0.1}, "of its own"),
    ):
        config = {
            **classification_config,
            "loss": change,
            "data": {**classification_config["data"], "multi_label": "label_smoothing" in change},
        }
        with pytest.raises(UserError, match=message):
            classification(config)


def test_an_encoder_without_its_weights_is_no_pretrained_model(trained, tmp_path, tiny_bert):
    model = transformers.AutoModel.from_pretrained(tiny_bert)
    model.save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "bert")
    weights = load_file(tmp_path / "bert" / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if "encoder" not in k or ".dense." not in k},
        tmp_path / "bert" / "model.safetensors",
        {"format": "pt"},
    )
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


def test_predict_does_not_replace_a_folder(trained, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("a")
    code, output = in_process(capsys, "predict", trained[1] / "model", "--text", "x", "--out", tmp_path / "mine")
    assert code == 1 and "is a folder" in output and (tmp_path / "mine" / "a.txt").read_text() == "a"


def test_predict_keeps_the_file_that_is_there(trained, tmp_path, capsys):
    keep = tmp_path / "keep.jsonl"
    keep.write_text("mine\n")
    code, output = in_process(
        capsys, "predict", trained[1] / "model", tmp_path / "nothing.jsonl", "--out", keep, "--overwrite"
    )
    assert code == 1 and keep.read_text() == "mine\n" and "no such file" in output
    assert in_process(capsys, "predict", trained[1], "--text", "x", "--batch-size", "0")[0] == 2
    code, output = in_process(capsys, "predict", trained[1], "--text", " ")
    assert code == 1 and "the text is empty" in output
    code, output = in_process(capsys, "predict", trained[1], "--text", "x", "--out", "/proc/nothing/x.jsonl")
    assert code == 1 and "/proc/nothing" in output


def test_a_run_folder_may_have_any_name(trained, tmp_path, capsys):
    shutil.copytree(trained[1], tmp_path / "a #1")
    code, output = in_process(capsys, "eval", tmp_path / "a #1", f"data.eval={trained[0].parent}/train.jsonl")
    assert code == 0 and "accuracy" in output


def test_small_mistakes(trained, tmp_path, capsys):
    assert "Known: ." not in in_process(capsys, "validate", tmp_path / "nothing.yaml")[1]
    code, output = in_process(capsys, "validate", trained[0], "parallel.deepspeed={zero_optimization: {stagee: 1}}")
    assert code == 1 and "stagee" in output
    code, output = in_process(capsys, "validate", trained[0], "run.dir=/proc/foo")
    assert code == 1 and "/proc/foo" in output
    assert (
        configuration.validate(
            {"task": "causal_lm", "model": {"path": "x"}, "loss": None, "data": {"eval": None}}
        ).loss.z_loss
        == 0
    )


def test_prepared_data_goes_over_nobodys_folder(trained, tmp_path):
    """data.cache with a folder train/ that is a user's own data set, also one of .json files only;
    and a set whose name is a path.
    """
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "a.json").write_text("{}")
    assert "holds other files" in refused("train", trained[0], f"data.cache={tmp_path}", f"run.dir={tmp_path}/run")
    assert (tmp_path / "train" / "a.json").read_text() == "{}"
    assert "without slashes" in refused(
        "validate", trained[0], f"data.eval={{../../x: {trained[0].parent}/train.jsonl}}", f"run.dir={tmp_path}/run"
    )


def test_a_run_reads_nothing_that_it_writes(trained, tmp_path):
    """A folder as training data with run.dir in it, also through a link: metrics.jsonl
    would be data at the next resume. A data.cache is no data, but in a saved data set.
    """
    shutil.copy(trained[0].parent / "train.jsonl", tmp_path)
    given = (f"data.train={tmp_path}", f"run.dir={tmp_path}/run")
    assert "holds run.dir" in refused("train", trained[0], *given)
    assert "holds run.dir" in refused("validate", trained[0], *given)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    assert "holds run.dir" in refused(
        "validate", trained[0], f"data.train={tmp_path}/corpus", f"run.dir={tmp_path}/elsewhere/run"
    )
    datasets.Dataset.from_list([{"text": "x", "label": "a"}, {"text": "y", "label": "b"}]).save_to_disk(
        tmp_path / "saved"
    )
    assert "holds data.cache" in refused(
        "validate",
        trained[0],
        f"data.train={tmp_path}/saved",
        f"run.dir={tmp_path}/run",
        f"data.cache={tmp_path}/saved/cache",
    )
    assert not list(tmp_path.rglob("MANIFEST.json"))
    shutil.copy(trained[0].parent / "train.jsonl", tmp_path / "corpus" / "train.jsonl")
    launch.fastft(
        "validate",
        trained[0],
        f"data.train={tmp_path}/corpus",
        f"run.dir={tmp_path}/run",
        f"data.cache={tmp_path}/corpus/cache",
    )


def test_a_file_that_arrives_before_the_data_is_read(trained, tmp_path, monkeypatch):
    """Between the listing that the key is made of and the reading: it would be learnt from, and be in no manifest."""
    (tmp_path / "data").mkdir()
    shutil.copy(trained[0].parent / "train.jsonl", tmp_path / "data" / "a.jsonl")
    config = configuration.load(trained[0], [f"data.train={tmp_path}/data", f"run.dir={tmp_path}/run"])
    fingerprint = prepared.fingerprint

    def late(files, known):
        shutil.copy(tmp_path / "data" / "a.jsonl", tmp_path / "data" / "z.jsonl")
        return fingerprint(files, known)

    monkeypatch.setattr(prepared, "fingerprint", late)
    with pytest.raises(UserError, match=r"z.jsonl: came or went"):
        TASKS.get(config.task)(config).train_split()
    monkeypatch.undo()
    assert len(TASKS.get(config.task)(config).train_split()) == 64


def test_two_failed_overwrites_keep_the_last_good_run_and_others_old_files(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained[1], run)
    good = (run / "model" / "model.safetensors").read_bytes()
    for _ in range(2):
        refused(
            "train",
            trained[0],
            f"run.dir={run}",
            "--overwrite",
            "optim.lr=1e38",
            "train.steps=30",
            "train.max_skipped=0",
        )
    assert (run / "model.old" / "model.safetensors").read_bytes() == good
    other = tmp_path / "other"
    (other / "model.old").mkdir(parents=True)
    launch.fastft("train", trained[0], f"run.dir={other}", "train.steps=1")
    assert (other / "model.old").is_dir(), "a folder that no run wrote"


def test_scratch_names_are_nobodys(trained, tmp_path, capsys):
    """export to X beside a user's X.tmp, predict --out X beside X.tmp."""
    for name in ("exported.tmp", "out.jsonl.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").touch()
    assert in_process(capsys, "export", trained[1], tmp_path / "exported")[0] == 0
    assert in_process(capsys, "predict", trained[1], "--text", "x", "--out", tmp_path / "out.jsonl")[0] == 0
    assert all((tmp_path / name / "mine").exists() for name in ("exported.tmp", "out.jsonl.tmp"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["exported", "exported.tmp", "out.jsonl", "out.jsonl.tmp"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_replacing_is_all_or_nothing(tmp_path, kind):
    def write(path, text):
        if kind == "folder":
            path.mkdir()
            path = path / "a"
        path.write_text(text)

    def read(path):
        return ((path / "a") if kind == "folder" else path).read_text()

    target = tmp_path / "x"
    with replacing(target) as scratch:
        write(scratch, "one")
    with pytest.raises(RuntimeError), replacing(target) as scratch:
        write(scratch, "half")
        raise RuntimeError
    assert read(target) == "one" and len(list(tmp_path.iterdir())) == 1
    write(tmp_path / ".x.fastft-new", "left by a kill")
    with replacing(target) as scratch:
        write(scratch, "two")
    assert read(target) == "two" and len(list(tmp_path.iterdir())) == 1


def test_an_export_is_compared_and_refuses_nan(trained, tmp_path, capsys, monkeypatch):
    from fastft.models import weight_files
    from fastft.train import export

    assert in_process(capsys, "export", trained[1], tmp_path / "a")[0] == 0
    last = max(load_file(tmp_path / "a" / "model.safetensors"))

    def failing_disk(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)

    monkeypatch.setattr(weight_files, "fsync", failing_disk)
    code, output = in_process(capsys, "export", trained[1], tmp_path / "b")
    assert code == 1 and f"{tmp_path / 'b'}: {last} read back differ" in output and not (tmp_path / "b").exists()
    monkeypatch.undo()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(trained[1] / "model")
    state = model.state_dict()
    state["classifier.bias"] = torch.full_like(state["classifier.bias"], float("nan"))
    with pytest.raises(UserError, match=r"classifier.bias holds NaN"):
        export.save(assemble.trained(str(trained[1])), state, tmp_path / "c", "fp32")
    assert sorted(os.listdir(tmp_path)) == ["a"]


def test_in_place_gradients_need_memory_of_their_own():
    target = torch.tensor([0, 1])
    for logits in (torch.randn(1, 5).expand(2, 5), torch.randn(9).unfold(0, 5, 3)):
        with pytest.raises(ValueError, match="memory of their own"):
            cross_entropy(logits.clone().as_strided(logits.shape, logits.stride()), target, inplace=True)
    strided = torch.randn(2, 10)[:, ::2].requires_grad_()
    cross_entropy(strided * 1, target, inplace=True).backward()


def test_labels_of_saved_data_sets(classification_config, tmp_path):
    names = datasets.ClassLabel(names=["neg", "pos"])
    rows = {"text": ["a", "b"], "label": [[0, 1], [1]]}
    for feature in (datasets.Sequence(names), datasets.List(names)):
        datasets.Dataset.from_dict(
            rows, features=datasets.Features({"text": datasets.Value("string"), "label": feature})
        ).save_to_disk(tmp_path / "many")
        assert [r["label"] for _, r in formats.read(configuration.Source(path=str(tmp_path / "many")))] == [
            ["neg", "pos"],
            ["pos"],
        ]
    one = datasets.Features({"text": datasets.Value("string"), "label": names})
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [0, -1]}, features=one).save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match="row 2: the label is empty"):
        classification(classification_config, train=str(tmp_path / "one")).train_split()


@pytest.mark.parametrize("value", ["[null]", '[["a"]]', '[{"a": 1}]', "[NaN]"])
def test_labels_that_are_none(classification_config, tmp_path, value):
    (tmp_path / "odd.jsonl").write_text('{"text": "x", "label": ["b"]}\n{"text": "x", "label": ' + value + "}\n")
    with pytest.raises(UserError, match=r"odd.jsonl:2: .* among the labels is no label"):
        classification(classification_config, train=str(tmp_path / "odd.jsonl"), multi_label=True).train_split()


def test_a_model_without_label_names_is_evaluated_by_number(trained, tmp_path, tiny_bert, capsys):
    transformers.AutoModelForSequenceClassification.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "model")
    (tmp_path / "eval.jsonl").write_text(
        '{"text": "x", "label": 0}\n{"text": "y", "label": 1}\n{"text": "y", "label": "LABEL_1"}\n'
    )
    code, output = in_process(
        capsys,
        "eval",
        trained[0],
        f"model.path={tmp_path}/model",
        f"data.eval={tmp_path}/eval.jsonl",
        f"run.dir={tmp_path}/run",
    )
    assert code == 0 and "examples 3" in output


def test_predict_reads_what_training_reads(trained, tmp_path, capsys):
    (tmp_path / "bare.csv").write_text('1,an "apple"\n2,a bear\n')
    options = ("--header", "id,text", "--quoting", "none")
    code, output = in_process(capsys, "predict", trained[1], tmp_path / "bare.csv", *options)
    assert code == 0 and [json.loads(line)["text"] for line in output.splitlines()] == ['an "apple"', "a bear"]
    long = " ".join(["a"] * 40)  # the run's max_length is 32
    for model, more, cut in (
        (trained[1], (), True),
        (trained[1] / "model", (), False),
        (trained[1] / "model", ("--max-length", "32"), True),
    ):
        code, output = in_process(capsys, "predict", model, "--text", long, *more)
        assert code == 0 and json.loads(output).get("truncated", False) == cut
    assert (
        in_process(capsys, "predict", trained[1], "--text", "x", "--documents", "page")[0] == 0
    )  # not read for --text
    code, output = in_process(capsys, "predict", trained[1], tmp_path / "bare.csv", "--quoting", "some")
    assert code == 1 and "quoting" in output


def test_pairs_in_training_and_prediction(classification_config, tmp_path, capsys):
    """A model without token types (DistilBERT) learns pairs, and predict gives it both texts."""
    config = transformers.DistilBertConfig(
        vocab_size=200, dim=16, hidden_dim=32, n_layers=1, n_heads=2, max_position_embeddings=64
    )
    transformers.DistilBertForSequenceClassification(config).save_pretrained(tmp_path / "distil")
    transformers.AutoTokenizer.from_pretrained(classification_config["model"]["path"]).save_pretrained(
        tmp_path / "distil"
    )
    config.vocab_size = len(transformers.AutoTokenizer.from_pretrained(tmp_path / "distil"))
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "distil")
    rows = [{"a": f"text {i}", "b": "x", "label": "ab"[i % 2]} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    run = {
        **classification_config,
        "model": {"path": str(tmp_path / "distil")},
        "train": {"steps": 1},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "text": "a", "text_pair": "b"},
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "offline": True},
    }
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", run))
    code, output = in_process(capsys, "predict", tmp_path / "run", tmp_path / "pairs.jsonl")
    together = [json.loads(line)["scores"] for line in output.splitlines()]
    assert code == 0 and len(together) == 8
    code, output = in_process(capsys, "predict", tmp_path / "run", "--text", "text 0")
    assert code == 1 and "no text_pair" in output
    assert json.loads(in_process(capsys, "predict", tmp_path / "run", "--text", "text 0", "--pair", "x")[1])[
        "scores"
    ] == pytest.approx(together[0])


def test_a_damaged_checkpoint_is_passed_over_aloud(trained, tmp_path):
    run = tmp_path / "run"
    launch.fastft("train", trained[0], f"run.dir={run}", "checkpoint.every=2")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"kind": "train", "st')  # a kill cut it short
    next((run / "checkpoints" / "step-4" / "deepspeed").iterdir()).write_bytes(b"x")
    _, output = launch.fastft("export", run, tmp_path / "exported")
    assert "does not match its hash" in output and "Going back to" in output
    shutil.rmtree(run / "model")  # a run that is finished needs no checkpoint
    _, output = launch.fastft("resume", run)
    assert "does not match its hash" in output
    from fastft import track

    records = track.read(run)
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 4]
    assert "does not match its hash" in [r for r in records if r["kind"] == "run"][-1]["resumed_from"]["passed_over"][0]


def test_a_run_goes_on_from_any_working_directory(classification_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"text": f"text {i}", "label": "ab"[i % 2]}) + "\n" for i in range(8))
    )
    config = {
        **classification_config,
        "data": {"train": "rows.jsonl"},
        "train": {"steps": 1},
        "run": {"dir": "run", "device": "cpu", "offline": True},
    }
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", config))
    monkeypatch.chdir("/")
    launch.fastft("resume", tmp_path / "run", "train.steps=2")
    launch.fastft("export", tmp_path / "run", tmp_path / "exported")


@pytest.mark.parametrize(
    "text, part",
    [
        ("a: {{ b }}", "where a key belongs"),
        ("a: 2026-99-99", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("[" * 5000 + "]" * 5000, "not valid YAML"),
    ],
)
def test_yaml_that_yaml_itself_trips_over(tmp_path, text, part):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UserError, match=part):
        configuration.load(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    "override",
    [
        "optim.betas=[0.9, 1.0]",
        "run.seed=9223372036854775808",
        "train.epochs=.inf",
        "optim.lr=.inf",
        "optim.eps=.inf",
        "optim.weight_decay=.inf",
        "optim.grad_clip=.inf",
        "data.label_separator=''",
        "optim.lr=.nan",
    ],
)
def test_numbers_out_of_range(trained, override):
    with pytest.raises(UserError, match=override.partition("=")[0].replace(".", "[.]")):
        configuration.load(trained[0], [override])


def test_files_that_are_not_utf8(trained, tmp_path, capsys):
    (tmp_path / "latin.txt").write_bytes("caf\xe9\n".encode("latin-1"))
    for key in ("data.labels", "parallel.deepspeed"):
        code, output = in_process(capsys, "validate", trained[0], f"{key}={tmp_path}/latin.txt")
        assert code == 1 and key in output and "latin.txt" in output


@pytest.mark.parametrize(
    "settings, part",
    [
        ("{comms_logger: 3}", "must be a mapping"),
        ("{activation_checkpointing: 5}", "parallel.deepspeed"),
        ("{tensorboard: {enabled: true, x: 2}}", "tensorboard.x"),
        ("{wall_clock_breakdwn: true}", "wall_clock_breakdown"),
        ("{zero_optimization: 3}", "not a mapping"),
        ("{amp: {enabled: true}}", "removed"),
    ],
)
def test_deepspeeds_own_settings(trained, capsys, settings, part):
    code, output = in_process(capsys, "validate", trained[0], f"parallel.deepspeed={settings}")
    assert code == 1 and part in " ".join(output.split())


def test_output_that_cannot_be_written(trained, capsys):
    process = launch.start(
        ["bash", "-c", f"exec python -m fastft predict {trained[1]} --text x > /dev/full"],
        {"PATH": os.path.dirname(os.sys.executable) + ":" + os.environ["PATH"]},
    )
    output = launch.finish(process, 120)
    assert process.returncode == 1 and "No space left" in output and "Traceback" not in output
    for temperature in ("1e-45", "0.001"):
        assert in_process(capsys, "predict", trained[1], "--text", "x", "--temperature", temperature)[0] == 1


def test_a_huge_number_in_a_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x", "n": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match=r"a.jsonl:1"):
        list(formats.read(configuration.Source(path=str(tmp_path / "a.jsonl"))))
