"""Trackers with the real packages, read back; what fails in them does not end the run."""

import importlib.util
import json
import logging
import math
import shutil
import struct

import pytest

import launch
from fastft import config as configuration
from fastft import rooms, track
from fastft.errors import UserError
from fastft.track import Telemetry, _shared
from fastft.track.base import Record, Tracker

NAMES = ("mlflow", "tensorboard", "wandb")
INSTALLED = [name for name in NAMES if importlib.util.find_spec(name)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, corpus, tiny_llama):
    """Four steps on 2 ranks, then back to the checkpoint of step 2 and on to 5 on one."""
    folder = tmp_path_factory.mktemp("tracked")
    config = {
        "task": "causal_lm",
        "model": {"path": str(tiny_llama)},
        "data": {"train": str(corpus / "train.jsonl"), "eval": {"held out": str(corpus / "eval.jsonl")},
                 "max_length": 32, "truncation": "truncate"},
        "batch": {"size": 6},
        "optim": {"lr": 0.002},
        "train": {"steps": 4, "log_every": 1, "eval_every": 2},
        "checkpoint": {"every": 2, "keep": 9},
        "run": {"dir": str(folder / "run"), "offline": True, "device": "cpu", "threads": 1, "trackers": INSTALLED},
    }  # fmt: skip
    launch.ranks(2, ["-m", "fastft", "train", launch.write_config(folder / "c.yaml", config)])
    shutil.rmtree(folder / "run" / "checkpoints" / "step-4")
    launch.fastft("resume", folder / "run", "train.steps=5")
    return folder / "run"


def losses(run) -> dict[int, float]:
    """As they were done last."""
    return {r["step"]: r["loss"] for r in track.read(run) if r["kind"] == "train"}


def test_tensorboard(run):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    files = list((run / "trackers" / "tensorboard").iterdir())
    assert len(files) == 2  # rank 0's, and the resumed run's
    found = accumulators.EventAccumulator(str(run / "trackers" / "tensorboard")).Reload()
    assert {"train/loss", "train/lr", "train/grad_norm", "eval/held out/loss"} <= set(found.Tags()["scalars"])
    curve = {event.step: event.value for event in found.Scalars("train/loss")}
    assert len(found.Scalars("train/loss")) == 5 and curve == pytest.approx(losses(run), rel=1e-6)
    assert [event.step for event in found.Scalars("eval/held out/loss")] == [2, 4, 5]
    text = found.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| optim.lr | 0.002 |" in text and "weight_decay" not in text


def test_mlflow(run, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(run / "trackers" / "mlflow").as_uri())
    experiment = client.get_experiment_by_name("fastft")
    (found,) = client.search_runs([experiment.experiment_id])  # the resumed run is the same
    assert found.info.run_id == json.loads((run / "trackers" / "ids.json").read_text())["mlflow"]["run"]
    assert found.info.status == "FINISHED" and found.info.run_name == "run"
    params = found.data.params
    assert params["optim.lr"] == "0.002" and params["train.steps"] == "4" and "optim.weight_decay" not in params
    assert found.data.tags["changed.train.steps"] == "5"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert sorted(metric.step for metric in history) == [1, 2, 3, 3, 4, 4, 5]
    assert {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)} == pytest.approx(losses(run))
    evals = client.get_metric_history(found.info.run_id, "eval/held out/loss")
    assert {metric.step for metric in evals} == {2, 4, 5}


def wandb_records(path) -> list:
    """Records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, part, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is padding
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def test_wandb(run):
    pytest.importorskip("wandb")
    folders = sorted((run / "trackers" / "wandb" / "wandb").glob("offline-run-*"))
    ident = json.loads((run / "trackers" / "ids.json").read_text())["wandb"]["run"]
    assert len(folders) == 2 and all(folder.name.endswith(ident) for folder in folders)
    curve: dict[int, float] = {}
    for folder in folders:
        (file,) = folder.glob("*.wandb")
        records = wandb_records(file)
        started = next(r.run for r in records if r.WhichOneof("record_type") == "run")
        assert started.run_id == ident and started.project == "fastft" and started.display_name == "run"
        for record in records:
            if record.WhichOneof("record_type") == "history":
                row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                if "train/loss" in row:
                    curve[row["step"]] = row["train/loss"]
    assert curve == pytest.approx(losses(run))
    settings = {i.key or "/".join(i.nested_key): i.value_json for i in started.config.update}
    assert settings["optim.lr"] == "0.002" and settings["train.steps"] == "5"


class Broken(Tracker):
    """Fails where it is told to."""

    def open(self, folder, config):
        self.calls = []
        if self.settings == "open":
            raise ConnectionError("no server")

    def record(self, record):
        self.calls.append(record)
        if self.settings == "record" and len(self.calls) > 1:
            raise ConnectionError("no server any more")

    def close(self):
        self.calls.append("closed")


def test_one_that_fails_is_logged_once_and_left_out(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    trackers = [Broken("open"), Broken("record"), Broken("never")]
    log = Telemetry(tmp_path, main=True, trackers=trackers)
    log.open_trackers(tmp_path, None)
    for step in range(1, 5):
        log.record("train", step=step, loss=math.nan if step == 2 else 1.0 / step, skipped=False)
    log.close()
    first, second, third = (tracker.calls for tracker in trackers)
    assert first == [] and len(second) == 2 and len(third) == 5 and third[-1] == "closed"
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2 and all("gets no more records: ConnectionError: no server" in m for m in messages)
    assert [_shared.points(r) for r in third[:3]] == [{"train/loss": 1.0}, {}, {"train/loss": 1 / 3}]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 4
    other = Telemetry(tmp_path, main=False, trackers=[broken := Broken("never")])
    other.open_trackers(tmp_path, None)
    assert not hasattr(broken, "calls")  # another rank's


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_names_the_extra(monkeypatch, name):
    kind = rooms.TRACKERS.get(name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(UserError, match=rf"run.trackers.{name}: the package {name} is not installed.\npip install "
                                        rf"'fastft\[{name}\]'"):  # fmt: skip
        kind(kind.Settings())


@pytest.mark.parametrize(
    "trackers, chosen",
    [
        ("tensorboard", {"tensorboard": {}}),
        (["tensorboard", "wandb"], {"tensorboard": {}, "wandb": {}}),
        ([{"mlflow": {"experiment": "x"}}, "tensorboard"], {"mlflow": {"experiment": "x"}, "tensorboard": {}}),
        ({"wandb": {"mode": "offline", "tags": ["a"]}}, {"wandb": {"mode": "offline", "tags": ["a"]}}),
        ({"tensorboard": False}, {}),
    ],
)
def test_short_forms(trackers, chosen):
    raw = {"task": "causal_lm", "model": {"path": "m"}, "run": {"trackers": trackers}}
    config = configuration.validate(raw)
    found = {name: s.model_dump(exclude_defaults=True) for name, s in config.run.trackers.chosen().items()}
    assert found == chosen
    again = configuration.validate(
        {"task": "causal_lm", "model": {"path": "m"}, **json.loads(config.model_dump_json())}
    )
    assert again.run.trackers.chosen() == config.run.trackers.chosen()
    with pytest.raises(UserError, match="Did you mean 'tensorboard'"):
        configuration.validate({**raw, "run": {"trackers": "tensorbord"}})


def test_only_settings_that_differ_are_sent_and_only_finite_numbers():
    raw = {"task": "causal_lm", "model": {"path": "m"}, "data": {"train": "a.txt"}, "optim": {"lr": 1e-3}}
    sent = _shared.settings(configuration.validate(raw))
    assert sent["optim.lr"] == 1e-3 and json.loads(sent["data.train"])[0]["path"] == "a.txt"
    # optim.master: what its default, auto, came to
    assert set(sent) <= {"task", "model.path", "data.train", "optim.lr", "optim.master"}
    record = Record("eval", 0.0, {"step": 3, "set": "s", "loss": None, "accuracy": 0.5, "exact": True})
    assert _shared.points(record) == {"eval/s/accuracy": 0.5}
