"""A step that went wrong, looked at sample by sample."""

import json
from pathlib import Path

import launch
from fastft import track


def test_a_spike_stops_the_run_and_replay_shows_its_samples(lm_config, tmp_path):
    """The loss of tiny batches moves by more than a thousandth, so the first step with a full history ends the run."""
    lm_config["batch"] = {"size": 2}
    lm_config["train"] = {"steps": 300, "spike_factor": 1.001}
    lm_config["checkpoint"] = {"every": 20}
    code, output = launch.fastft("train", launch.write_config(tmp_path / "c.yaml", lm_config), check=False)
    run = Path(lm_config["run"]["dir"])
    spike = next(r for r in track.read(run) if r["kind"] == "spike")
    assert (
        code == 1
        and f"step {spike['step']}: the loss" in output
        and f"fastft replay {run} --step {spike['step']}" in output
        and "Traceback" not in output
    )
    assert spike["step"] > 50 and len(spike["samples"]) == 2 and spike["loss"] > 1.001 * spike["usual"]
    _, output = launch.fastft("replay", run, "--step", str(spike["step"]), "--json")
    found = json.loads(output.splitlines()[-1])
    assert sorted(s["sample"] for s in found["samples"]) == sorted(spike["samples"])
    assert f"step-{(spike['step'] - 1) // 20 * 20}" in found["weights"]
    assert all(s["loss"] > 0 and s["grad_norm"] > 0 and s["documents"] for s in found["samples"])
    assert found["samples"][0]["loss"] >= found["samples"][1]["loss"]


def test_trace_and_replay_know_the_data_that_the_run_read(classification_config, tmp_path):
    """Another row in the file makes other samples of the same ids."""
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", classification_config))
    run, data = Path(classification_config["run"]["dir"]), Path(classification_config["data"]["train"])
    launch.fastft("trace", run, "--step", "2")
    row = data.read_text().splitlines()[1]
    with open(data, "a") as f:
        f.write(row + "\n")
    for verb in ("trace", "replay"):
        code, output = launch.fastft(verb, run, "--step", "2", check=False)
        assert code == 1 and "changed since this was written" in output and "Traceback" not in output
    launch.fastft("trace", tmp_path / "c.yaml", "--step", "2")  # of a run that would begin


def test_replay_of_the_first_step_is_its_loss(classification_config, tmp_path):
    """No dropout and one sequence per step: the loss of step 1 is that of its
    sample under the model that the run began with; the head is drawn from the seed.
    """
    classification_config["batch"] = {"size": 1}
    launch.fastft("train", launch.write_config(tmp_path / "c.yaml", classification_config))
    run = Path(classification_config["run"]["dir"])
    first = next(r for r in track.read(run) if r["kind"] == "train")
    _, output = launch.fastft("replay", run, "--step", "1", "--json")
    (sample,) = json.loads(output.splitlines()[-1])["samples"]
    assert (
        abs(sample["loss"] - first["loss"]) < 1e-5
        and abs(sample["grad_norm"] - first["grad_norm"]) < 1e-4 * first["grad_norm"]
    )
    code, output = launch.fastft("replay", run, "--step", "99", check=False)
    assert code == 1 and "the run has steps 1 to 4" in output
