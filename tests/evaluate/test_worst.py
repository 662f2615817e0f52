"""Evaluations keep the worst rows in a file of the run, and say how sure their metrics are."""

import json
import math

import jobs
import numpy as np
import pytest

import launch
from fastft import track
from fastft.tasks._generated import GenerationEvaluation, Scores
from fastft.tasks._intervals import intervals
from fastft.tasks.base import SampleMetrics
from fastft.train.errors import write_worst
from fastft.train.evaluation import measure

RUNS = launch.ROOT / "tests" / "train" / "runs.py"


class Means(SampleMetrics):
    """The mean of a column, by a function of its sum."""

    def __init__(self, numbers):
        self.of_columns = numbers

    def update(self, model, batch): ...

    def columns(self):
        return {}

    def numbers(self, columns):
        return self.of_columns(columns)


def test_intervals_are_those_of_a_share():
    """Of 400 rows that are right with probability 0.7: the normal approximation, as it holds for so many."""
    right = (np.random.default_rng(1).random(400) < 0.7).astype(float)
    metrics = Means(lambda columns: {"accuracy": float(columns["right"].mean()), "rows": len(columns["right"])})
    found = intervals(metrics, {"right": right}, ["accuracy", "loss"], 2000)
    half = 1.96 * math.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert set(found) == {"accuracy"}
    assert found["accuracy"] == pytest.approx([right.mean() - half, right.mean() + half], abs=0.1 * half)
    assert found == intervals(metrics, {"right": right}, ["accuracy"], 2000)
    assert intervals(metrics, {}, ["accuracy"], 2000) == {}


def test_intervals_of_bleu_are_sacrebleus():
    sacrebleu = pytest.importorskip("sacrebleu.metrics")
    rng = np.random.default_rng(0)
    words = ["the", "a", "cat", "dog", "sleeps", "drinks", "water", "today", "tomorrow"]
    references = [" ".join(rng.choice(words, rng.integers(5, 20))) for _ in range(120)]
    texts = [" ".join(w for w in r.split() if rng.random() > 0.2) for r in references]
    scores = Scores(GenerationEvaluation(metrics=["bleu", "chrf"]))
    found = intervals(Means(scores.finish), scores.columns(texts, references), ["bleu", "chrf"], 1000)
    for name, metric in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        theirs = metric.corpus_score(texts, [references], n_bootstrap=1000)
        low, high = found[name]
        assert low < theirs.score < high and (high - low) / 2 == pytest.approx(theirs._ci, rel=0.12)


@pytest.mark.parametrize("world", [1, 2])
def test_a_run_keeps_its_worst_rows(classification_config, tmp_path, world):
    """Of all ranks together, the worst first, with their texts; the file is that of the last evaluation."""
    config = classification_config
    config["evaluation"] = {"worst": 5, "bootstrap": 200}
    config["train"] |= {"eval_every": 2}
    path = launch.write_config(tmp_path / "c.yaml", config)
    launch.ranks(world, [RUNS, "train", path])
    run = tmp_path / "run"
    worst = [json.loads(line) for line in (run / "errors" / "test.jsonl").read_text().splitlines()]
    launch.fastft("eval", run, "--out", tmp_path / "all.jsonl")
    every = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    wanted = sorted(every, key=lambda row: row["gold_score"])[:5]
    assert [row["row"] for row in worst] == [row["row"] for row in wanted]
    assert all(row["step"] == 4 and row["text"] and row["gold"] for row in worst)
    assert [row["gold_score"] for row in worst] == pytest.approx([row["gold_score"] for row in wanted], rel=1e-4)
    records = [record for record in track.read(run) if record["kind"] == "eval"]
    assert [record["step"] for record in records] == [2, 4]
    for record in records:
        low, high = record["intervals"]["accuracy"]
        assert 0 <= low <= record["accuracy"] <= high <= 1 and low < high
    found = json.loads(launch.fastft("eval", run, "--json")[1].strip().splitlines()[-1])["test"]
    assert set(found["intervals"]) == {"loss", "accuracy", "f1_macro"}
    assert "95 % intervals: loss " in launch.fastft("eval", run)[1]


def test_nothing_is_kept_where_nothing_is_asked_for(classification_config, tmp_path):
    classification_config["evaluation"] = {"worst": 0}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", classification_config))
    assert not (tmp_path / "run" / "errors").exists()
    assert "intervals" not in next(r for r in track.read(tmp_path / "run") if r["kind"] == "eval")


def test_a_file_that_is_gone_does_not_end_a_run(classification_config, tmp_path, caplog):
    """Once data is prepared, training does not need the files any more: the worst rows are then without texts."""
    job = jobs.job_of(classification_config, evals=True)
    metrics, ids = measure(job, job.evals["test"])
    (tmp_path / "test.jsonl").unlink()
    write_worst(job, "test", metrics, ids, 3)
    lines = [json.loads(line) for line in (tmp_path / "run" / "errors" / "test.jsonl").read_text().splitlines()]
    assert len(lines) == 12 and all("text" not in line and line["gold"] and line["step"] == 3 for line in lines)
    assert "no such file" in caplog.text and "without their texts" in caplog.text
    (tmp_path / "run" / "errors" / "test.jsonl").unlink()
    (tmp_path / "run" / "errors").rmdir()
    (tmp_path / "run" / "errors").write_text("in the way")
    write_worst(job, "test", metrics, ids, 3)
    assert "not written" in caplog.text
