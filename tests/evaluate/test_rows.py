"""After training: predictions beside columns of the data, what each row was judged by, scores by class."""

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import classification_report, precision_recall_fscore_support

import launch
from fastft import config as configuration
from fastft.errors import UserError
from fastft.evaluate.metrics import evaluate_model
from fastft.evaluate.predict import kept_beside, rounded
from fastft.tasks import _judged


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert):
    """A classifier that is not always right: (rows of its evaluation set, run folder)."""
    folder = tmp_path_factory.mktemp("rows")
    words = {"a": "apple", "b": "bear", "c": "cloud"}
    rows = [
        {
            "id": 100 + i,
            "note": 0.1 + 0.2,
            "text": f"{words[label]} number {i}" + " and so on" * (i % 3),
            "label": label,
        }
        for i, label in enumerate("abcabcaabbcabcabcaab")
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [dict(row, label="abc"[i % 3]) for i, row in enumerate(rows)]  # some of it wrong
    (folder / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": str(folder / "train.jsonl"), "eval": {"dev": str(folder / "dev.jsonl")}, "max_length": 32},
        "batch": {"size": 8},
        "optim": {"lr": 5e-3},
        "train": {"steps": 20},
        "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1},
    }
    launch.fastft("train", launch.write_config(folder / "c.yaml", config))
    return rows, folder / "run"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval_writes_what_each_row_was_judged_by(run, tmp_path):
    rows, folder = run
    out = tmp_path / "judged.jsonl"
    _, output = launch.fastft("eval", folder, "--out", out, "--keep", "id,label", "--json")
    written = lines(out)
    assert "20 rows -> " in output and [r["id"] for r in written] == [r["id"] for r in rows]
    assert [r["gold"] for r in written] == [r["input_label"] for r in written] == [r["label"] for r in rows]
    assert [r["text"] for r in written] == [r["text"] for r in rows] and written[3]["row"].endswith("dev.jsonl:4")
    assert all(0 < r["score"] <= 1 and r["gold_score"] <= r["score"] and len(str(r["score"])) <= 8 for r in written)
    metrics = json.loads(output[output.index("{") :].splitlines()[0])["dev"]
    gold, label = ([r[key] for r in written] for key in ("gold", "label"))
    assert metrics["accuracy"] == pytest.approx(np.mean([a == b for a, b in zip(gold, label, strict=True)]))
    report = classification_report(gold, label, output_dict=True, zero_division=0)
    for name, scores in metrics["classes"].items():
        wanted = {k.replace("f1-score", "f1"): v for k, v in report[name].items()}
        assert scores == pytest.approx(wanted)


def test_eval_prints_the_weakest_class_first(run):
    _, output = launch.fastft("eval", run[1])
    shown = [line.split("│") for line in output.splitlines() if line.startswith("│")]
    scores = [float(cells[4]) for cells in shown]
    assert len(shown) == 3 and scores == sorted(scores) and sum(int(cells[5]) for cells in shown) == 20


def test_predict_keeps_columns_and_the_best_scores(run, tmp_path):
    rows, folder = run
    out = tmp_path / "pred.jsonl"
    arguments = ["predict", folder, folder.parent / "dev.jsonl", "--out", out, "--keep", "id, label,note"]
    _, output = launch.fastft(*arguments, "--top-k", 2, "--batch-size", 7)
    written = lines(out)
    assert output.strip() == f"20 rows -> {out}"
    assert [(r["id"], r["input_label"]) for r in written] == [(r["id"], r["label"]) for r in rows]
    assert all(r["note"] == 0.1 + 0.2 for r in written), "a column is copied, not rounded"
    assert all(len(r["scores"]) == 2 and next(iter(r["scores"])) == r["label"] for r in written)
    assert max(len(str(score)) for r in written for score in r["scores"].values()) <= 10
    before = out.read_bytes()
    code, output = launch.fastft(*arguments, check=False)
    assert code == 1 and f"--out {out}: exists already" in output and out.read_bytes() == before
    launch.fastft(*arguments, "--overwrite")
    assert len(lines(out)[0]["scores"]) == 3


MISTAKES = {
    "a column that is not there": (["--keep", "idd"], "no column 'idd' to keep", "Did you mean 'id'"),
    "no scores to choose from": (["--top-k", "0"], "--top-k", ""),
    "a folder that is not there": (["--out", "/nowhere/x.jsonl"], "there is no folder /nowhere", "mkdir"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_of_predict(run, name):
    options, *parts = MISTAKES[name]
    code, output = launch.fastft("predict", run[1], run[1].parent / "dev.jsonl", *options, check=False)
    assert code != 0 and all(part in output for part in parts) and "Traceback" not in output


def test_what_has_no_scores_and_no_rows(tiny_llama, corpus, lm_config, tmp_path):
    code, output = launch.fastft("predict", tiny_llama, "--text", "x", "--top-k", "2", check=False)
    assert code == 1 and "--top-k: this model's task gives no scores" in output
    code, output = launch.fastft("predict", tiny_llama, "--text", "x", "--keep", "id", check=False)
    assert code == 1 and "--keep: only a data file has columns" in output
    with pytest.raises(UserError, match="task causal_lm judges no single rows"):
        evaluate_model(configuration.validate(lm_config), rows=True)


def test_other_tasks_judge_rows_too():
    values = np.array([[1.0, np.nan], [2.0, 5.0]])
    judged = _judged.rated(np.array([[1.5, 4.0], [2.0, 4.0]]), values, ["x", "y"])
    assert judged[0] == (
        0,
        {"gold": {"x": 1.0, "y": None}, "value": {"x": 1.5, "y": 4.0}, "error": {"x": 0.5, "y": None}},
    )
    assert _judged.rated(np.array([[3.0]]), np.array([[1.0]]), ["x"]) == [
        (0, {"gold": 1.0, "value": 3.0, "error": 2.0})
    ]


def test_many_labels_a_row():
    logits, labels = np.array([[2.0, -1.0, 0.5], [-3.0, -1.0, -2.0]]), np.array([[1.0, 1, 0], [0, 0, 0]])
    (_, first), (_, second) = _judged.classified(logits, labels, ["a", "b", "c"])
    assert first["gold"] == ["a", "b"] and first["labels"] == ["a", "c"] and set(first["scores"]) == {"a", "b", "c"}
    assert first["scores"]["a"] == pytest.approx(1 / (1 + np.exp(-2))) and second == {
        "gold": [],
        "labels": [],
        "scores": {},
    }
    found = _judged.class_scores(logits > 0, labels > 0.5, ["a", "b", "c"])
    precision, recall, f1, support = precision_recall_fscore_support(labels, logits > 0, zero_division=0)
    assert [s["f1"] for s in found.values()] == list(f1) and found["b"]["support"] == support[1] == 1
    assert [(s["precision"], s["recall"]) for s in found.values()] == list(zip(precision, recall, strict=True))


def test_digits_and_names():
    assert rounded({"scores": {"a": 0.123456789}, "value": 1234567.891234, "n": 3}) == {
        "scores": {"a": 0.123457},
        "value": 1234567.89,
        "n": 3,
    }
    assert kept_beside({"id": 1, "label": "x"}, {"label": "y"}) == {"id": 1, "input_label": "x", "label": "y"}
