"""How a run begins, goes on and ends, as its user sees it; what is exported of it."""

import json
import os
from pathlib import Path

import pytest
import yaml

import launch
from fastft import config as configuration
from fastft import track


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert):
    """Evaluated before its first step, best at a step that is not the last: (configuration, folder, output)."""
    folder = tmp_path_factory.mktemp("end")
    rows = [{"text": f"{'apple' if i % 2 else 'bear'} {i}", "label": "ab"[i % 2]} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": str(folder / "rows.jsonl"), "eval": {"dev": str(folder / "rows.jsonl")}},
        "batch": {"size": 8},
        "optim": {"lr": 5e-3},
        "train": {"steps": 12, "eval_every": 3, "eval_at_start": True},
        "checkpoint": {"every": 3, "best_by": "dev.accuracy", "keep": 1},
        "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1},
    }
    path = launch.write_config(folder / "c.yaml", config)
    _, output = launch.fastft("train", path)
    return path, folder / "run", output


def test_the_evaluation_before_the_first_step_is_no_best(run):
    evaluations = [r for r in track.read(run[1]) if r["kind"] == "eval"]
    assert [r["step"] for r in evaluations] == [0, 3, 6, 9, 12] and "step 0  dev: loss" in run[2]
    best = track.read(run[1])[-1]["best"]
    assert best["step"] == next(r["step"] for r in evaluations[1:] if r["accuracy"] == best["value"])


def test_the_best_is_said_and_exported(run, tmp_path):
    best = track.read(run[1])[-1]["best"]
    assert (
        run[2].splitlines()[-1].startswith(f"best: step {best['step']}") and "dev.accuracy" in run[2].splitlines()[-1]
    )
    _, output = launch.fastft("export", run[1], tmp_path / "best", "--best")
    assert f"step {best['step']}, dev.accuracy {best['value']:.4g}" in output
    _, output = launch.fastft("eval", run[1], f"model.path={tmp_path / 'best'}", "--json")
    assert json.loads(output)["dev"]["accuracy"] == pytest.approx(best["value"])


def test_resume_says_from_where_and_what_changed(run, tmp_path):
    config = yaml.safe_load(run[0].read_text())
    config["run"]["dir"] = str(tmp_path / "run")
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", config), "train.steps=6")
    _, output = launch.fastft("resume", tmp_path / "run", "train.steps=7", "optim.lr=5e-5")
    assert "from step 6; optim.lr 0.005 -> 5e-05; train.steps 6 -> 7\n" in output and "step 0  dev" not in output
    _, output = launch.fastft("resume", tmp_path / "run", "train.steps=8", "--json")
    assert "from step 7; train.steps 7 -> 8\n" in output


def test_exported_files_follow_the_umask(run, tmp_path):
    before = os.umask(0o027)
    try:
        from fastft.evaluate.export import export_checkpoint

        folder = export_checkpoint(run[1], tmp_path / "out")
    finally:
        os.umask(before)
    modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert "model.safetensors" in modes and set(modes.values()) == {0o640}, modes


def test_what_counts_as_a_change(run):
    config = configuration.load(run[0])
    now = config.model_dump(mode="json")
    full = configuration.absolute(config).model_dump(mode="json")
    assert configuration.changes(full, now) == []
    other = {**now, "optim": {**now["optim"], "lr": 1e-4}, "data": {**now["data"], "eval": {}}}
    changed = configuration.changes(other, now)
    assert "optim.lr 0.0001 -> 0.005" in changed and any("data.eval.dev[0].path None -> " in c for c in changed)
    assert not [c for c in changed if "run.dir" in c]
    assert configuration.changes({"a": [{"path": "x/y.csv"}]}, {"a": [{"path": str(Path.cwd() / "x/y.csv")}]}) == []
    assert configuration.changes({"a": "x.csv"}, {"a": "z.csv"}) == ["a x.csv -> z.csv"]
