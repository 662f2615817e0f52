"""The proof that users run themselves."""

import json

import pytest

import launch


@pytest.mark.parametrize(("name", "more"), [("term", []), pytest.param("kill", ["--kill"], marks=pytest.mark.long)])
def test_verify_resume_proves_equality_and_finds_a_difference(lm_config, tmp_path, name, more):
    lm_config["train"] = {"steps": 30}
    lm_config["checkpoint"] = {"every": 4}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    _, output = launch.fastft(
        "verify-resume", path, "--folder", tmp_path / name, "--nproc", "2", "--at", "5", *more, "--json"
    )
    found = json.loads(output.splitlines()[-1])
    assert found["equal"] and found["steps"] == 30 and 1 <= found["interrupted_after"] < 30
    from fastft.evaluate import verify_resume

    model = tmp_path / name / "interrupted" / "model" / "model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    assert verify_resume._differing_files(tmp_path / name / "whole" / "model", model.parent) == [
        "model.safetensors differs"
    ]
    code, output = launch.fastft("verify-resume", path, "--folder", tmp_path / name, check=False)
    assert code == 1 and "exists already" in output
