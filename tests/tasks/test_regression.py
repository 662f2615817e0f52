import json
import math

import jobs
import numpy as np
import pytest
import torch
import transformers
from scipy import stats

import launch
from fastft import track
from fastft.errors import UserError
from fastft.evaluate.predict import predict, predictor
from fastft.tasks.regression import RegressionMetrics


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


ROWS = [{"text": f"{'good ' * (i % 5)}day {i}", "score": 100.0 + 10 * (i % 5), "other": str(i)} for i in range(20)]


@pytest.fixture
def config(tmp_path, tiny_bert) -> dict:
    return {
        "task": "regression",
        "model": {"path": str(tiny_bert)},
        "data": {"train": write(tmp_path / "train.jsonl", ROWS), "max_length": 32},
        "batch": {"size": 8},
        "train": {"steps": 2},
        "run": {"dir": str(tmp_path / "run"), "offline": True, "device": "cpu", "threads": 1},
    }


def task_over(config, tmp_path, rows, **data):
    config["data"] |= {"train": write(tmp_path / "rows.jsonl", rows), **data}
    return jobs.task_of(config)


def test_large_values_that_differ_by_little(config, tmp_path):
    """Timestamps: what float32 would round away is what is to be learned."""
    rows = [{"text": f"{'late' if i % 2 else 'soon'} {i}", "score": 1.7e9 + 20 * (i % 2)} for i in range(16)]
    config["data"]["train"] = write(tmp_path / "t.jsonl", rows)
    job = jobs.job_of(config)
    assert jobs.batch_of(job, [0, 1]).labels.flatten().tolist() == [1.7e9, 1.7e9 + 20]
    loss = jobs.loss_of(job, jobs.batch_of(job, np.arange(16)), 1 / 16)
    assert 0.5 < float(loss) < 2.0  # of standardized values: 1 for a model that knows nothing


def test_targets_are_standardized_and_the_loss_is_mse(config):
    config["data"]["targets"] = ["score", "other"]  # numbers, and numbers written as text
    job = jobs.job_of(config)
    assert job.learned["targets"] == ["score", "other"] and job.learned["mean"] == [120.0, 9.5]
    batch = jobs.batch_of(job, np.arange(8))
    assert batch.labels.dtype == torch.float64 and batch.labels[3].tolist() == [130.0, 3.0]
    wanted = ((batch.labels - torch.tensor([120.0, 9.5])) / torch.tensor(job.learned["std"])).float()
    expected = torch.nn.functional.mse_loss(job.model(**batch.inputs).logits, wanted)
    assert torch.allclose(jobs.loss_of(job, batch, 1 / 8), expected)
    assert jobs.loss_of(job, jobs.batch_of(job, [])) == 0 and job.train.targets.sum() == 20
    assert job.model.config.problem_type == "regression" and job.model.config.target_mean == [120.0, 9.5]
    config["data"]["normalize"] = False
    assert jobs.job_of(config).learned["std"] == [1.0, 1.0]


@pytest.mark.parametrize("value", [None, "", float("nan"), "NaN"])
def test_missing_targets(config, tmp_path, value):
    rows = [*ROWS, {"text": "x", "score": value, "other": 1}, {"text": "y", "score": 1.0, "other": 2}]
    with pytest.raises(UserError, match=r"(?s)rows.jsonl:21: target 'score' is empty.*data.missing"):
        task_over(config, tmp_path, rows).train_split()
    dropped = task_over(config, tmp_path, rows, missing="drop").train_split()
    assert len(dropped) == 21 and dropped.data.meta["counts"]["dropped"] == 1
    task = task_over(config, tmp_path, rows, missing="ignore", targets=["score", "other"])
    split = task.train_split()
    assert len(split) == 22 and split.targets[20] == 0.5 and split.data.meta["counts"]["targets_ignored"] == 1
    job = jobs.job_of(config)
    alone = jobs.batch_of(job, [20])
    alone.labels[0, 1] = float(job.learned["mean"][1])
    other = job.model(**alone.inputs).logits[0, 1]
    assert torch.allclose(jobs.loss_of(job, alone, 2.0), other.square())  # only the target that is there


@pytest.mark.parametrize(
    "value, part",
    [("high", "is no number: 'high'"), (True, "is no number: True"), ("inf", "is no number"), ([1], "no number")],
)
def test_bad_targets_name_the_row(config, tmp_path, value, part):
    with pytest.raises(UserError, match=f"rows.jsonl:2: target 'score' {'is ' if part == 'no number' else ''}{part}"):
        task_over(config, tmp_path, [ROWS[0], {"text": "x", "score": value}]).train_split()


def test_all_bad_rows_are_counted(config, tmp_path):
    """Whatever is wrong with them, up to as many as tell that it is not a few rows."""
    bad = [{"text": "x", "score": "high"}, {"text": "x", "score": None}, {"text": 3, "score": 1.0}, {"text": "x"}]
    with pytest.raises(UserError, match=r"rows.jsonl:3: column 'text' holds int.*\(3 more rows cannot be used\)\.\n"):
        rows = [*ROWS[:2], bad[2], bad[0], ROWS[2], bad[1], bad[3]]
        task_over(config, tmp_path, rows).train_split()
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*\(at least 999 more rows cannot be used\)"):
        task_over(config, tmp_path, [bad[0]] * 1500).train_split()
    with pytest.raises(UserError, match=r"rows.jsonl:1: column 'text' holds int"):  # and not what ends the reading
        task_over(config, tmp_path, [bad[2], [1]]).train_split()


def test_bad_settings(config, tmp_path):
    with pytest.raises(UserError, match="exclude each other"):
        task_over(config, tmp_path, ROWS, target="score", targets=["other"])
    del config["data"]["targets"]
    with pytest.raises(UserError, match=r"Did you mean 'score'(?s:.*)data.target"):
        task_over(config, tmp_path, ROWS, target="scores").train_split()
    config["data"]["target"] = "score"
    with pytest.raises(UserError, match="split makes no sense"):
        task_over(config, tmp_path, ROWS, truncation="split")
    task = task_over(config, tmp_path, [{"text": "x", "score": 1}, {"text": "y", "score": 1}], truncation="error")
    with pytest.raises(UserError, match="target 'score' has the value 1 in all 2 rows"):
        task.learned(task.train_split())


def test_metrics_are_scipys_and_constant_predictions_give_nan():
    generator = np.random.default_rng(0)
    predicted, values = generator.normal(size=(2, 50, 2)).round(1)
    values[3, 1] = np.nan
    learned = {"targets": ["a", "b"], "mean": [0.0, 0.0], "std": [1.0, 1.0]}
    columns = {"loss": np.full(50, 0.04), "predicted": predicted, "values": values}
    found = RegressionMetrics(learned).finish(
        [{name: column[a:b] for name, column in columns.items()} for a, b in ((0, 20), (20, 50))]
    )
    assert found["pearson_a"] == pytest.approx(stats.pearsonr(predicted[:, 0], values[:, 0])[0])
    used = ~np.isnan(values[:, 1])
    assert found["spearman_b"] == pytest.approx(stats.spearmanr(predicted[used, 1], values[used, 1])[0])
    assert found["mse"] == pytest.approx((found["mse_a"] + found["mse_b"]) / 2) and found["loss"] == pytest.approx(
        2 / 49.5
    )
    same = RegressionMetrics(learned).finish([{**columns, "predicted": np.ones((50, 2))}])
    assert math.isnan(same["pearson"]) and math.isnan(same["spearman_a"]) and same["mae"] > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bert):
    """Pairs, one target; a run of 1 rank and one of 2 with ZeRO-2."""
    folder = tmp_path_factory.mktemp("regression")
    data = write(folder / "rows.jsonl", [{**row, "pair": "a day"} for row in ROWS])
    runs = {}
    for name, zero in (("one", 0), ("two", 2)):
        config = {
            "task": "regression",
            "model": {"path": str(tiny_bert)},
            "data": {"train": data, "eval": {"dev": data}, "text_pair": "pair", "max_length": 32},
            "batch": {"size": 5},
            "optim": {"lr": 3e-3, "schedule": "constant"},
            "train": {"steps": 30 if name == "one" else 3, "log_every": 1},
            "checkpoint": {"best_by": "dev.spearman"},
            "parallel": {"zero": zero},
            "run": {"dir": str(folder / name), "offline": True, "device": "cpu", "threads": 1},
        }
        runs[name] = str(launch.write_config(folder / f"{name}.yaml", config))
    script = str(launch.ROOT / "tests" / "train" / "runs.py")
    launch.ranks(1, [script, "train", runs["one"]])
    launch.ranks(2, [script, "train", runs["two"]])
    return folder


def test_ranks_agree_and_the_model_learns(trained):
    one, two = ([r["loss"] for r in track.read(trained / name) if r["kind"] == "train"] for name in ("one", "two"))
    assert np.allclose(one[:3], two, rtol=1e-4)
    found = [r for r in track.read(trained / "one") if r["kind"] == "eval"][-1]
    assert found["spearman"] > 0.8 and found["mse"] < 100  # in units of the data, whose variance is 200


def test_exported_model_predicts_in_units_of_the_data(trained):
    row = {"text": ROWS[4]["text"], "text_pair": "a day"}
    (found,) = predict(predictor(str(trained / "one" / "model"), {}), [("x", row)])
    assert found["text"] == row["text"] and 115 < found["value"] < 150
    config = transformers.AutoConfig.from_pretrained(trained / "one" / "model")
    assert config.problem_type == "regression" and config.id2label == {0: "score"} and config.target_mean == [120.0]
    code, output = launch.fastft("eval", str(trained / "one"))
    assert code == 0 and "spearman" in output


def test_shipped_config_reads_its_data(minilm, tmp_path, monkeypatch):
    from fastft import assemble
    from fastft import config as configuration

    monkeypatch.chdir(launch.ROOT)
    options = [f"model.path={minilm}", f"run.dir={tmp_path}", "run.offline=true"]
    job = assemble.start(configuration.load("configs/regression/stsb.yaml", options))
    assemble.add_data(job)
    assert len(job.train) == 1200 and len(job.evals["dev"]) == 400 and 2 < job.learned["mean"][0] < 3
