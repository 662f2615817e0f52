import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fastft import config
from fastft.errors import UserError

MINIMAL = {"task": "causal_lm", "model": {"path": "m"}}


def load(tmp_path, raw, overrides=()):
    path = tmp_path / "c.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return config.load(path, list(overrides))


def test_minimal_and_round_trip(tmp_path):
    loaded = load(tmp_path, {**MINIMAL, "data": {"train": "a.jsonl", "eval": {"x": "b.csv"}}})
    assert loaded.data.train[0].path == "a.jsonl" and loaded.data.eval["x"][0].path == "b.csv"
    assert load(tmp_path, config.dump(loaded)) == loaded


def test_short_forms_of_sources(tmp_path):
    data = load(
        tmp_path, {**MINIMAL, "data": {"train": ["a.txt", {"path": "b.txt", "documents": "line"}], "eval": "c.txt"}}
    ).data
    assert [s.path for s in data.train] == ["a.txt", "b.txt"] and data.train[1].documents == "line"
    assert list(data.eval) == ["eval"]


@pytest.mark.parametrize(
    "raw, parts",
    [
        ({**MINIMAL, "optim": {"learning_rte": 1}}, ["optim.learning_rte", "unknown key", "Known:", "lr"]),
        ({**MINIMAL, "optim": {"warmupp": 1}}, ["optim.warmupp", "Did you mean 'warmup'"]),
        ({**MINIMAL, "optimm": {}}, ["optimm", "Did you mean 'optim'"]),
        ({**MINIMAL, "data": {"train": [{"path": "x", "formt": "csv"}]}}, ["formt", "Did you mean 'format'"]),
        ({**MINIMAL, "optim": {"lr": "fast"}}, ["optim.lr", "'fast'"]),
        (
            {**MINIMAL, "batch": {"size": 2, "global_tokens": 5}},
            ["batch.size and batch.global_tokens exclude each other"],
        ),
        ({**MINIMAL, "train": {"epochs": 1, "steps": 2}}, ["train.epochs and train.steps exclude each other"]),
        ({**MINIMAL, "optim": {"warmup": 3.5}}, ["neither a fraction"]),
        ({**MINIMAL, "optim": {"state_dtype": "int4"}}, ["optim.state_dtype", "'int8'"]),
        (
            {**MINIMAL, "optim": {"master": "remainder"}, "parallel": {"zero": 2}},
            ["optim.master: remainder needs model.dtype: bf16", "(here fp32)"],
        ),
        ({**MINIMAL, "model": {"path": "org/x", "trust_remote_code": True}}, ["pin it with model.revision"]),
        ({"model": {"path": "m"}}, ["task: required"]),
        ({**MINIMAL, "version": 2}, ["version"]),
        ("task: causal_lm\ntask: x\n", ["appears twice"]),
        ("a: [", ["not valid YAML"]),
        ("just text", ["expected a mapping"]),
    ],
)
def test_mistakes_name_the_key(tmp_path, raw, parts):
    with pytest.raises(UserError) as e:
        load(tmp_path, raw)
    for part in parts:
        assert part in str(e.value)


def test_all_mistakes_at_once(tmp_path):
    with pytest.raises(UserError, match="2 mistakes"):
        load(tmp_path, {**MINIMAL, "optim": {"lr": -1}, "batch": {"sze": 1}})


def test_overrides(tmp_path):
    loaded = load(
        tmp_path, MINIMAL, ["optim.lr=2e-5", "data.train=[a.txt, b.txt]", "train.steps=7", "optim.grad_clip=null"]
    )
    assert (
        loaded.optim.lr == 2e-5
        and len(loaded.data.train) == 2
        and loaded.train.steps == 7
        and loaded.optim.grad_clip is None
    )


@pytest.mark.parametrize(
    "override, part",
    [("optim.lr", "not of the form"), ("optim.lrr=1", "Did you mean 'lr'"), ("model.path.x=1", "not a section")],
)
def test_bad_overrides(tmp_path, override, part):
    with pytest.raises(UserError, match=part):
        load(tmp_path, MINIMAL, [override])


def test_entries_of_a_list_are_overridden_by_their_numbers(tmp_path):
    raw = {**MINIMAL, "data": {"train": ["a.txt", {"path": "b.txt", "weight": 1}]}}
    found = load(tmp_path, raw, ["data.train.0.weight=0.5", "data.train.1.weight=2", "data.train.1.name=b"]).data.train
    assert [(s.path, s.weight, s.name) for s in found] == [("a.txt", 0.5, None), ("b.txt", 2, "b")]
    assert load(tmp_path, raw, ["data.train.1=c.txt"]).data.train[1].path == "c.txt"
    for key in ("2.weight", "b.weight", "2"):
        with pytest.raises(
            UserError, match=r"'data.train' is a list of 2 in the file.*\n.*data\.train\.0 is the first"
        ):
            load(tmp_path, raw, [f"data.train.{key}=1"])


@pytest.mark.parametrize(
    "raw, said",
    [
        ({"train": {"eval_every": -1}}, "train.eval_every: Input should be greater than or equal to 1 (got -1)"),
        (
            {"batch": {"micro": "x"}},
            "batch.micro: Input should be a valid integer, unable to parse string as an integer, or",
        ),
        (
            {"data": {"train": "a", "curriculum": [{"until": "x", "weights": {}}]}},
            "data.curriculum.0.until: Input should be",
        ),
        (
            {"train": {"forgetting": True, "forgeting": True}},
            "Did you mean 'forgetting'? Known: early_stopping, epochs",
        ),
        ({"data": {"train": [{"path": "a", "wieght": 1}]}}, "data.train.0.wieght: unknown key. Did you mean 'weight'?"),
    ],
)
def test_mistakes_speak_of_keys_and_not_of_pydantics_types(tmp_path, raw, said):
    with pytest.raises(UserError) as e:
        load(tmp_path, {**MINIMAL, **raw})
    assert said in str(e.value) and "1 mistake:" in str(e.value)
    assert not re.search(r"constrained|literal|\.(int|float|str|bool)\b|forgetting, forgetting", str(e.value))


def test_missing_file_offers_neighbours(tmp_path):
    (tmp_path / "banking.yaml").touch()
    with pytest.raises(UserError, match=r"banking.yaml"):
        config.load(tmp_path / "bankin.yaml")


def test_scientific_notation_is_a_number(tmp_path):
    assert load(tmp_path, "task: causal_lm\nmodel: {path: m}\noptim: {lr: 2e-5}\n").optim.lr == 2e-5


def test_loading_a_config_needs_no_torch():
    code = "import sys, fastft.config; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


def test_inputs_are_the_local_files(tmp_path):
    """Model and data, but no hub id, and settings written out are no file."""
    (tmp_path / "model").mkdir()
    loaded = config.validate(
        {
            "task": "causal_lm",
            "model": {"path": str(tmp_path / "model"), "tokenizer": "org/name"},
            "parallel": {"deepspeed": {"wall_clock_breakdown": True}},
            "data": {"train": ["a.txt", "b.txt"], "eval": {"x": "c.txt", "y": "a.txt"}},
        }
    )
    loaded.model.tokenizer = str(tmp_path / "modle")  # no hub id: whether it is there is for the hosts to say
    assert config.inputs(loaded)["model.tokenizer"] == tmp_path / "modle"
    loaded.model.tokenizer = None
    assert list(dict.fromkeys(config.inputs(loaded).values())) == [
        tmp_path / "model",
        Path("a.txt"),
        Path("b.txt"),
        Path("c.txt"),
    ]


@pytest.mark.parametrize(
    "override", ["optim.lr=true", "train.steps=yes", "batch.micro=on", "run.threads=true", "optim.warmup=true"]
)
def test_a_boolean_is_no_number(tmp_path, override):
    with pytest.raises(UserError, match=r"boolean|no value"):
        load(tmp_path, MINIMAL, [override])
    assert load(tmp_path, MINIMAL, ["checkpoint.background=no"]).checkpoint.background is False


def test_true_is_a_member_with_its_defaults_and_no_section(tmp_path):
    assert load(tmp_path, {**MINIMAL, "model": {"path": "m", "lora": True}}).model.lora.r == 16
    with pytest.raises(UserError, match="batch"):
        load(tmp_path, {**MINIMAL, "batch": True})
    loaded = load(tmp_path, {**MINIMAL, "model": {"path": "m", "lora": True}}, ["model.lora.r=3"])
    assert loaded.model.lora.r == 3
    short = {**MINIMAL, "run": {"trackers": "tensorboard"}}
    assert load(tmp_path, short, ["run.trackers.wandb.project=x"]).run.trackers.wandb.project == "x"
    with pytest.raises(UserError, match=r"'layer_decay' is 0\.9 in the file"):
        load(tmp_path, {**MINIMAL, "optim": {"layer_decay": 0.9}}, ["optim.layer_decay.rate=0.8"])


@pytest.mark.parametrize("verb", ["train", "validate", "eval", "resume"])
def test_a_wrong_key_is_told_before_torch_is_imported(tmp_path, verb):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**MINIMAL, "optim": {"lrr": 1}}))
    target = tmp_path if verb == "resume" else tmp_path / "config.yaml"
    code = (
        "import sys\nfrom fastft.cli.main import main\n"
        f"try:\n    main([{verb!r}, {str(target)!r}])\nexcept SystemExit as e:\n    assert e.code == 1\n"
        "assert 'torch' not in sys.modules"
    )
    root = Path(__file__).parent.parent
    process = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert process.returncode == 0 and "optim.lrr: unknown key" in process.stderr, process.stderr


def test_a_model_may_be_its_path_alone():
    found = config.validate({"task": "causal_lm", "model": "some/model", "data": {"train": "x.jsonl"}})
    assert found.model.path == "some/model"


def test_paths_are_expanded_as_a_shell_does(monkeypatch, tmp_path):
    """In every key that is a path, and in the launcher's look at run.dir."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("CORPUS", "texts")
    raw = {
        "task": "causal_lm",
        "model": "~/model",
        "data": {"train": ["~/${CORPUS}/a.jsonl", {"path": "$CORPUS/b.jsonl"}], "eval": "~/e.jsonl", "cache": "~/c"},
        "run": {"dir": "$HOME/runs/x"},
    }
    (tmp_path / "a$b").touch()  # a name that is there is taken as it is
    as_it_is = config.validate({**raw, "data": {"train": str(tmp_path / "a$b")}})
    assert as_it_is.data.train[0].path == str(tmp_path / "a$b")
    found = config.validate(raw)
    assert found.model.path == f"{tmp_path}/model" and found.run.dir == f"{tmp_path}/runs/x"
    assert [s.path for s in found.data.train] == [f"{tmp_path}/texts/a.jsonl", "texts/b.jsonl"]
    assert found.data.eval["eval"][0].path == f"{tmp_path}/e.jsonl" and found.data.cache == f"{tmp_path}/c"
    path = tmp_path / "c.yaml"
    path.write_text("task: causal_lm\nrun: {dir: ~/x}\n")
    assert config.run_dir(path) == tmp_path / "x"


def test_patterns_in_paths(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "c.txt", "[x].csv"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    raw = {
        **MINIMAL,
        "data": {"train": ["*.jsonl", "[x].csv"], "eval": {"dev": {"path": "?.txt", "documents": "line"}}},
    }
    loaded = load(tmp_path, raw)
    assert [s.path for s in loaded.data.train] == ["a.jsonl", "b.jsonl", "[x].csv"]  # the last is a file's own name
    assert loaded.data.eval["dev"] == [config.Source(path="c.txt", documents="line")]
    with pytest.raises(UserError, match=r"c.yaml: data.eval.eval: \*\*/\*.parquet: no file matches"):
        load(tmp_path, {**MINIMAL, "data": {"eval": "**/*.parquet"}})
