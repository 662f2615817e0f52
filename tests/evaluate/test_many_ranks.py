"""`fastft eval` and `fastft predict` on several ranks give what one process gives, in the same order."""

import json
from pathlib import Path

import pytest

import launch

TAGS = {"Angela": "B-PER", "Paris": "B-LOC", "Siemens": "B-ORG"}


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def classification(folder: Path, tiny_bert) -> dict:
    rows = [{"text": f"{word} number {i}" + " and so on" * (i % 3), "label": word[0]} for i in range(7)
            for word in ("apple", "bear", "cloud")]  # fmt: skip
    return {"model": {"path": str(tiny_bert)}, "data": {"train": write(folder / "train.jsonl", rows)}, "rows": rows[:7]}


def token_classification(folder: Path, tiny_bert) -> dict:
    words = ["Angela", "saw", "Paris", "and", "the", "works", "of", "Siemens"] * 4  # several windows a sentence
    rows = [{"tokens": words[i:], "tags": [TAGS.get(word, "O") for word in words[i:]]} for i in range(7)]
    data = {"train": write(folder / "train.jsonl", rows), "max_length": 24, "truncation": "split"}
    return {"model": {"path": str(tiny_bert)}, "data": data, "rows": rows}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_bert):
    """Of a task: its run's folder, and rows that it may be asked about."""
    found = {}

    def make(task: str) -> tuple[Path, list[dict]]:
        if task not in found:
            folder = tmp_path_factory.mktemp(task)
            made = {"classification": classification, "token_classification": token_classification}[task](
                folder, tiny_bert
            )
            rows = made.pop("rows")
            made["data"]["eval"] = {
                "dev": write(folder / "dev.jsonl", rows),
                "single": write(folder / "single.jsonl", rows[:1]),  # one of two ranks has no row
            }
            made["parallel"] = {"zero": 3 if task == "token_classification" else 0}  # two ranks then hold shards
            made |= {"task": task, "batch": {"size": 3}, "optim": {"lr": 3e-3}, "train": {"steps": 4}}
            made["run"] = {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1}
            launch.fastft("train", launch.write_config(folder / "c.yaml", made))
            found[task] = folder / "run", rows
        return found[task]

    return make


@pytest.mark.parametrize("task", ["classification", "token_classification"])
def test_eval(trained, tmp_path, task):
    run, rows = trained(task)
    _, output = launch.fastft("eval", run, "--json", "--out", tmp_path / "one.jsonl")
    alone = json.loads(output.strip().splitlines()[-1])
    outputs = launch.ranks(2, ["-m", "fastft", "eval", run, "--json", "--out", tmp_path / "two.jsonl"])
    together = json.loads(outputs[0].strip().splitlines()[-1])
    assert not outputs[1].strip().endswith("}"), "rank 0 speaks for all"
    assert together.keys() == alone.keys() == {"dev", "single"}
    for name, metrics in alone.items():
        assert together[name].keys() == metrics.keys()
        for metric, value in metrics.items():
            if metric == "classes":
                assert together[name][metric] == value
            elif metric != "intervals":  # of the same rows, which are drawn in another order
                assert together[name][metric] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, metric)
        assert metrics["intervals"].keys() == together[name]["intervals"].keys() >= {"loss", "accuracy"}
    one, two = (
        [json.loads(line) for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("one", "two")
    )
    assert len(one) == len(rows) + 1
    for a, b in zip(one, two, strict=True):
        numbers = {key for key, value in a.items() if isinstance(value, float)}
        assert all(b[key] == (pytest.approx(a[key], rel=1e-4) if key in numbers else a[key]) for key in a | b)


@pytest.mark.parametrize("zero", [0, 3])
def test_a_model_that_writes(pair_config, tmp_path, zero):
    """Generation in evaluations: as many steps on each of two ranks; at ZeRO 3 of weights in shards."""
    made = pair_config("t5")
    made["parallel"] = {"zero": zero}
    made["data"]["eval"] = made["data"]["train"]
    made["evaluation"] = {"metrics": ["chrf", "rouge"], "generation": {"max_new_tokens": 8}}
    made["train"] = {"steps": 2}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", made))
    run = tmp_path / "run"
    _, output = launch.fastft("eval", run, "--json")
    alone = json.loads(output.strip().splitlines()[-1])["eval"]
    outputs = launch.ranks(2, ["-m", "fastft", "eval", run, "--json"])
    together = json.loads(outputs[0].strip().splitlines()[-1])["eval"]
    del alone["intervals"], together["intervals"]
    assert together == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("task", ["classification", "token_classification"])
def test_predict(trained, tmp_path, task):
    """Seven rows in batches of two: the last round leaves a rank without any; through `fastft launch`, too. Of token
    classification the ranks hold shards.
    """
    run, _ = trained(task)
    arguments = ["predict", run, run.parent / "dev.jsonl", "--batch-size", "2", "--out"]
    launch.fastft(*arguments, tmp_path / "one.jsonl")
    launch.ranks(2, ["-m", "fastft", *arguments, tmp_path / "two.jsonl"])
    assert (tmp_path / "two.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
    if task == "classification":
        _, output = launch.fastft("launch", "--nproc", "2", *arguments, tmp_path / "three.jsonl")
        assert "7 rows -> " in output
        assert (tmp_path / "three.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()


def test_mistakes_end_all_ranks(trained, tmp_path):
    run, rows = trained("classification")
    bad = write(tmp_path / "bad.jsonl", [*rows[:3], {"text": ""}])
    code, output = launch.fastft("launch", "--nproc", "2", "predict", run, bad, "--batch-size", "2", check=False)
    assert code == 1 and "bad.jsonl:4: the text is empty" in output and "Traceback" not in output.split("launch:")[1]
    code, output = launch.fastft("launch", "--nproc", "2", "predict", run, "-", check=False)
    assert code == 1 and "on several ranks reads a data file" in output
    code, output = launch.fastft("launch", "--nproc", "2", "chat", run, check=False)
    assert code == 1 and "`eval RUN_DIR`" in output
