"""`fastft train --continue`: what a job that is started again does with what it left."""

import json

import pytest

import launch
from fastft import config as configuration
from fastft.errors import UserError
from fastft.train import loop
from fastft.train.resuming import begun


def test_a_job_that_is_started_again(lm_config, tmp_path, monkeypatch):
    lm_config["checkpoint"] = {"every": 2}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").symlink_to(lm_config["data"]["train"])
    lm_config["data"]["train"], lm_config["run"]["dir"] = "text.jsonl", "run"  # as most configurations say it
    path, run = launch.write_config(tmp_path / "c.yaml", lm_config), tmp_path / "run"
    config = configuration.load(path)
    assert begun(config) == "new"
    # An attempt that ended before its first checkpoint, as one leaves it.
    run.mkdir()
    (run / "config.yaml").write_text(configuration.dump(configuration.absolute(config)))
    (run / "metrics.jsonl").write_text(json.dumps({"kind": "run", "start_step": 0}) + "\n")
    assert begun(config) == "not saved"
    other = configuration.load(path, ["optim.lr=0.5"])
    assert begun(other) == "new", "somebody else's"
    with pytest.raises(UserError, match="already holds a run"):
        loop.train(other)
    launch.fastft("train", "--continue", path)
    assert begun(config) == "finished"
    code, output = launch.fastft("train", "--continue", path)
    assert code == 0 and "finished: all 4 steps are done" in output
    # The end is gone: it goes on from its checkpoint.
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if json.loads(line)["kind"] != "end"))
    assert begun(config) == "saved"
    launch.fastft("train", "--continue", path, "train.steps=6")
    starts = [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["kind"] == "run"]
    assert starts[-1]["start_step"] == 4
