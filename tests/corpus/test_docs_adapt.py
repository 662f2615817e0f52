"""docs/adapt.md: its commands, in a folder with such corpora and files."""

import json
import re
import shutil

import corpora
import pytest
import test_docs

import launch

PAGE = launch.ROOT / "docs" / "adapt.md"
pytest.importorskip("matplotlib")


def test_the_page_works_as_it_is_written(tmp_path, tiny_llama, monkeypatch):
    """Every fastft command runs on the YAML block that its file's name stands in."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_llama, tmp_path / "models" / "SmolLM2-135M")
    (tmp_path / "held_out").mkdir()
    for name, first in (("medical", 0), ("general", 100)):
        (folder := tmp_path / "made" / name).mkdir(parents=True)
        texts = [corpora.prose(first + n) for n in range(40)]
        made = corpora.made(folder, tiny_llama, str(corpora.jsonl(tmp_path / f"{name}.jsonl", texts)))
        shutil.copytree(made.folder, tmp_path / "corpora" / name)
        corpora.jsonl(tmp_path / "held_out" / f"{name}.jsonl", [corpora.prose(first + n) for n in range(40, 50)])
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "medical.txt").write_text("\n\n".join(corpora.prose(n) for n in range(60)))
    small = "batch: {size: 4}\n"
    for block in test_docs.blocks(PAGE, "yaml"):
        if name := re.match(r"# (\S+\.yaml)\n", block):
            block = block.replace("max_length: 1024", "max_length: 64").replace("steps: 1000", "steps: 4")
            block = block.replace("eval_every: 100", "eval_every: 2")
            block = re.sub(r"run: \{(.*)\}", r"run: {\1, device: cpu, threads: 1}", block)
            (tmp_path / name[1]).write_text(block + small)
    commands = re.findall(r"^fastft (.*)$", "\n".join(test_docs.blocks(PAGE, "bash")), re.MULTILINE)
    assert [command.split()[0] for command in commands][:4] == ["train", "train", "forgetting", "forgetting"]
    for command in commands:
        code, said = launch.fastft(*command.partition("#")[0].split(), check=False)
        if "--budget" in command and code:  # so small a model forgets nothing to speak of
            assert "of the weights tried keeps it at step" in said
        else:
            assert code == 0, said
    assert (tmp_path / "curves" / "pareto.png").is_file() and (
        tmp_path / "models" / "medical" / "config.json"
    ).is_file()
    points = json.loads((tmp_path / "curves" / "forgetting.json").read_text())["points"]
    assert {(p["run"], p["step"]) for p in points} == {(run, step) for run in ("plain", "replay") for step in (0, 2, 4)}
