"""Standard output holds what was asked for, and nothing else."""

import json
import os
import subprocess
import sys

import pytest

import launch
from fastft.cli.main import main


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert):
    """A configuration, its run's folder, and what training printed: (standard output, standard error)."""
    folder = tmp_path_factory.mktemp("streams")
    rows = [
        {"id": f"r{i}", "text": f"{'apple' if i % 2 else 'bear'} number {i}", "label": "ab"[i % 2]} for i in range(8)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": str(folder / "rows.jsonl"), "eval": {"test": str(folder / "rows.jsonl")}},
        "batch": {"size": 4},
        "train": {"steps": 2},
        "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1},
    }
    path = launch.write_config(folder / "c.yaml", config)
    return path, folder / "run", cold("train", path, "--json")


def cold(*arguments) -> tuple[str, str]:
    """In a new interpreter, which imports DeepSpeed itself."""
    command = [sys.executable, "-m", "fastft", *map(str, arguments)]
    done = subprocess.run(command, env=launch.ENV, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def said(capfd, *arguments) -> str:
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    assert end.value.code == 0
    return capfd.readouterr().out


def test_train(run):
    out, err = run[2]
    summary = json.loads(out)
    assert out.count("\n") == 1 and summary["step"] == 2 and summary["eval"]["test"]["examples"] == 8
    assert summary["model"] == str(run[1] / "model")
    assert "step 2/2  loss" in err and "accelerator" not in err and "Warning" not in err


def test_replay(run):
    out, err = cold("replay", run[1], "--step", 1, "--json")
    assert len(json.loads(out)["samples"]) == 4 and out.count("\n") == 1 and err == ""


def test_validate_eval_trace_and_export(run, tmp_path, capfd):
    path, folder, _ = run
    assert json.loads(said(capfd, "validate", path, "--json"))["steps"] == 2
    assert json.loads(said(capfd, "eval", folder, "--json"))["test"]["examples"] == 8
    assert len(json.loads(said(capfd, "trace", folder, "--json"))) == 4
    assert said(capfd, "export", folder, tmp_path / "out") == f"{tmp_path / 'out'}\n"
    assert json.loads(said(capfd, "predict", folder, "--text", "apple number 1"))["label"] in "ab"


def test_what_libraries_print_goes_to_standard_error(capfd):
    from fastft.streams import results_only

    with results_only():
        print("from Python")
        os.write(1, b"from C++\n")
        subprocess.run(["echo", "from a compiler"], check=True)
    print("a result")
    captured = capfd.readouterr()
    assert captured.out == "a result\n"
    assert {*captured.err.splitlines()} == {"from Python", "from C++", "from a compiler"}


def test_quiet_and_verbose(run, tmp_path, capfd):
    for option, shown in (("-q", []), ("-v", ["grad_norm", "padding", "cross_entropy on cpu: backend"])):
        _, output = launch.fastft("train", run[0], f"run.dir={tmp_path / option}", option)
        assert ("step 1/" in output) == bool(shown), output
        assert all(part in output for part in shown), output
        assert "Model:" in output
