"""docs/large-models.md: every command of the page, on a small model."""

import copy
import json
import re
from pathlib import Path

import pytest
import test_docs

import launch

PAGE = launch.ROOT / "docs" / "large-models.md"


def test_the_page_works_as_it_is_written(no_dropout, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    config = no_dropout
    config["train"]["steps"] = 2
    config["data"].pop("eval")
    config["data"]["eval"] = config["data"]["train"]
    for name in ("my", "documents"):
        made = copy.deepcopy(config)
        made["run"]["dir"] = f"runs/{name}"
        launch.write_config(tmp_path / f"{name}.yaml", made)
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": "the patient has a"}) + "\n")
    commands = re.findall(r"^fastft (.*)$", "\n".join(test_docs.blocks(PAGE, "bash")), re.MULTILINE)
    assert len(commands) == 11
    said = {}
    for command in commands:
        words = command.partition("#")[0].split()
        said[" ".join(words)] = launch.fastft(*words)[1]
    plans = [text for command, text in said.items() if command.startswith("plan")]
    assert all("ZeRO" in text and "fits" in text for text in plans)
    for run in ("my", "offload", "nf4", "auto", "long"):
        assert (Path("runs") / run / "model").is_dir(), run
    answer = json.loads(Path("answers.jsonl").read_text())
    assert answer["text"] and len(answer) > 1
    assert Path("exported/model.safetensors").is_file()
