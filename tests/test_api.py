"""fastft from Python: the whole of it in this process, and a notebook cell by cell."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import fastft
import launch

PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")


@pytest.fixture
def place(monkeypatch):
    """An environment that says nothing of ranks, as a notebook has it."""
    for name in PLACE:
        monkeypatch.delenv(name, raising=False)
    yield
    assert not [name for name in PLACE if name in os.environ], "a run left its place behind"


def test_importing_is_light():
    code = (
        "import sys, fastft\n"
        "before = set(sys.modules)\n"
        "assert {'fit', 'Run', 'Evaluation', 'UserError', '__version__'} <= set(dir(fastft))\n"
        "assert not {'torch', 'pydantic', 'numpy', 'yaml', 'rich'} & set(sys.modules)\n"
        "fastft.Run, fastft.fit, fastft.Config, fastft.UserError\n"
        "assert 'torch' not in sys.modules\n"
        "from fastft import train, config\n"
        "assert train.__path__ and config.__path__\n"
        "try:\n    fastft.fitt\nexcept AttributeError as e:\n    assert 'fit' in str(e)\n"
        "else:\n    raise AssertionError\n"
        "from fastft import *\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=launch.ROOT)


def test_fit_evaluate_predict_export(classification_config, tmp_path, place):
    run = fastft.fit(classification_config, {"optim.lr": 5e-3, "train.steps": 20}, checkpoint={"best_by": "test.loss"})
    assert run.config.optim.lr == 5e-3 and run.config.data.max_length == 32 and run.folder == tmp_path / "run"
    assert classification_config["train"] == {"steps": 4, "log_every": 1}, "the caller's mapping is the caller's"
    summary = run.summary
    assert isinstance(summary, fastft.Summary) and summary.step == 20 and summary.tokens_per_second > 0
    assert summary.best == fastft.Best(20, "test.loss", summary.eval["test"]["loss"]) and summary.stopped is None
    assert [record["step"] for record in run.history] == list(range(1, 21)) and run.model == tmp_path / "run" / "model"

    found = run.evaluate(rows=True)["test"]
    assert isinstance(found, fastft.Evaluation) and found.metrics == pytest.approx(summary.eval["test"])
    assert set(found.classes) == {"a", "b", "c"} and sum(s["support"] for s in found.classes.values()) == 12
    right = sum(row["gold"] == row["label"] for row in found.rows) / len(found.rows)
    assert right == pytest.approx(found.metrics["accuracy"]) and found.rows[0]["text"] == "apple number 16"

    predict = run.predictor(max_length=16)
    assert predict.fields == ("text",)
    one = predict("apple number 3")
    rows = [{"text": row["text"], "more": 1} for row in found.rows]
    many = predict(rows, batch_size=5, top_k=2)
    assert one == {**predict([{"text": "apple number 3"}])[0]} and all(len(r["scores"]) == 2 for r in many)
    assert [r["label"] for r in many] == [row["label"] for row in found.rows]
    with pytest.raises(fastft.UserError, match="row 1: no text"):
        predict([{"text": "x"}, {"txt": "y"}])

    assert run.export(tmp_path / "out") == tmp_path / "out"
    weights = tmp_path / "out" / "model.safetensors"
    assert weights.stat().st_mode & 0o777 == 0o666 & ~_umask()
    assert weights.read_bytes() == (run.model / "model.safetensors").read_bytes()


def _umask() -> int:
    now = os.umask(0)
    os.umask(now)
    return now


def test_two_runs_in_one_process_and_an_earlier_one(classification_config, tmp_path, place):
    first = fastft.fit(classification_config)
    path = launch.write_config(tmp_path / "c.yaml", classification_config)
    second = fastft.fit(path, run={"dir": str(tmp_path / "second")})
    assert first.folder != second.folder
    losses = [[record["loss"] for record in run.history] for run in (first, second)]
    assert losses[0] == losses[1], "the first run must leave nothing behind that the second one sees"
    opened = fastft.Run(tmp_path / "run")
    assert opened.summary == first.summary and "4 steps" in repr(opened)
    third = fastft.fit(opened.config, {"run.dir": str(tmp_path / "third")})  # a Config, as it was read
    assert [record["loss"] for record in third.history] == losses[0]
    resumed = opened.resume(train={"steps": 6})
    assert resumed.summary.step == 6 and [r["step"] for r in resumed.history] == [1, 2, 3, 4, 5, 6]


def alive() -> int:
    """Bytes of tensors that are reachable."""
    gc.collect()
    # Of these two types alone: what torch.compile leaves of other tests has no storage to ask.
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device.type == "cpu"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_runs_leave_no_training_state_behind(classification_config, tmp_path, place, zero):
    """Of the last one at most: runs in one process, a sweep's, do not add up."""
    found = []
    for name in ("first", "second", "third"):
        changes = {"run.dir": str(tmp_path / name), "train.steps": 2, "parallel.zero": zero}
        run = fastft.fit(classification_config, changes)
        size = sum(file.stat().st_size for file in run.model.glob("*.safetensors"))
        found.append(alive())
    assert found[2] - found[1] < size / 2


def test_a_run_that_dies_in_a_forward_leaves_nothing_behind(classification_config, tmp_path, place, monkeypatch):
    """At ZeRO 3, where DeepSpeed has a list of the modules that are being called."""
    from transformers.models.bert.modeling_bert import BertIntermediate

    plain, calls = BertIntermediate.forward, []

    def forward(self, hidden_states):
        calls.append(self)
        if len(calls) > 12:
            raise RuntimeError("dies here")
        return plain(self, hidden_states)

    monkeypatch.setattr(BertIntermediate, "forward", forward)
    found = []
    for name in ("first", "second", "third"):
        with pytest.raises(RuntimeError, match="dies here"):
            fastft.fit(classification_config, {"run.dir": str(tmp_path / name), "parallel.zero": 3})
        assert len(calls) > 12
        calls.clear()
        found.append(alive())
    assert found[2] - found[1] < 50_000


def test_two_ranks(classification_config, tmp_path):
    """As torchrun starts a script: every rank sees the whole run, and a second one can follow."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, sys, fastft\n"
        "for name in ('first', 'second'):\n"
        "    run = fastft.fit(sys.argv[1], {'run.dir': f'{sys.argv[2]}/{name}', 'parallel.zero': 2})\n"
        "    print('found', json.dumps([os.environ['RANK'], run.summary.step, run.history[-1]['loss']]))\n"
    )
    config = launch.write_config(tmp_path / "c.yaml", classification_config)
    outputs = launch.ranks(2, [script, config, tmp_path])
    found = [re.findall(r"^found (.*)$", output, re.MULTILINE) for output in outputs]
    first, second = ([json.loads(text) for text in texts] for texts in found)
    assert [r[:2] for r in first] == [["0", 4]] * 2 and [r[:2] for r in second] == [["1", 4]] * 2
    assert len({loss for _, _, loss in (*first, *second)}) == 1
    assert not [output for output in outputs if "untested optimizer" in output or "is deprecated" in output]


def test_interrupted_and_resumed(classification_config, tmp_path, place):
    """A notebook's stop button: SIGINT to this process, while it takes steps."""

    def stop_when_it_runs() -> None:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_when_it_runs).start()
    with pytest.raises(fastft.Interrupted, match="SIGINT: saved at step"):
        fastft.fit(classification_config, train={"steps": 100_000})
    run = fastft.Run(tmp_path / "run")
    reached = run.history[-1]["step"]
    assert run.summary is None and reached < 100_000
    with pytest.raises(fastft.UserError, match="the run has not ended"):
        run.predictor()
    assert run.resume({"train.steps": reached + 2}).summary.step == reached + 2


MISTAKES = {
    "no file": (lambda c, t: (t / "nothing.yaml",), {}, "nothing.yaml: no such configuration file"),
    "no configuration": (lambda c, t: (3,), {}, "config: int is no configuration"),
    "unknown key": (lambda c, t: (c, {"optim.learning": 1}), {}, "optim.learning: unknown key"),
    "unknown section": (lambda c, t: (c,), {"optimizer": {"lr": 1}}, "optimizer: unknown key"),
    "a value's part": (lambda c, t: (c, {"task.name": 1}), {}, "'task' is classification in the file, not a section"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(classification_config, tmp_path, name):
    make, sections, part = MISTAKES[name]
    with pytest.raises(fastft.UserError, match=part):
        fastft.fit(*make(classification_config, tmp_path), **sections)


def test_what_is_no_run(tmp_path):
    with pytest.raises(fastft.UserError, match="not a run folder"):
        fastft.Run(tmp_path)


def test_a_notebook(tiny_bert, tmp_path, monkeypatch, place):
    """docs/notebook.ipynb as it is, but for the cell of its parameters, which names a tiny model here."""
    nbformat = pytest.importorskip("nbformat", reason="pip install 'fastft[test]' brings nbclient and ipykernel")
    nbclient = pytest.importorskip("nbclient", reason="pip install 'fastft[test]' brings nbclient and ipykernel")
    notebook = nbformat.read(launch.ROOT / "docs" / "notebook.ipynb", as_version=4)
    nbformat.validate(notebook)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"model, steps, folder, length = {str(tiny_bert)!r}, 3, {str(tmp_path / 'run')!r}, 32"
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(launch.ROOT)}}
    ).execute()
    assert fastft.Run(tmp_path / "run").summary.step == 3 and (tmp_path / "run" / "exported").is_dir()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
    assert "step 3/3  loss" in printed and "accelerator" not in printed, printed


def test_the_page_about_python(tiny_bert, tmp_path, monkeypatch, place):
    """Every line of docs/python.md runs, in its order."""
    rows = "text,label\n" + "".join(
        f"{'card stolen' if i % 2 else 'money back'} {i},{'theft' if i % 2 else 'refund'}\n" for i in range(16)
    )
    (tmp_path / "rows.csv").write_text(rows)
    config = {
        "task": "classification",
        "model": {"path": str(tiny_bert)},
        "data": {"train": "rows.csv", "eval": {"test": "rows.csv"}},
        "batch": {"size": 8},
        "run": {"dir": "runs/my", "offline": True, "device": "cpu", "threads": 1},
    }
    launch.write_config(tmp_path / "my.yaml", config)
    monkeypatch.chdir(tmp_path)
    page = (launch.ROOT / "docs" / "python.md").read_text()
    names: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE):
        exec(block, names)
    assert names["run"].summary.step == 4 and (tmp_path / "exported" / "config.json").is_file()
    for name in fastft.__all__:
        assert name in page or name in ("Best",), name


def test_the_notebook_is_kept_without_output():
    notebook = json.loads((Path(launch.ROOT) / "docs" / "notebook.ipynb").read_text())
    assert not [cell for cell in notebook["cells"] if cell.get("outputs") or cell.get("execution_count")]
