"""docs/corpus.md: its files and its commands, from raw files to a model."""

import gzip
import json
import re
import shutil

import corpora
import test_docs

import launch

PAGE = launch.ROOT / "docs" / "corpus.md"


def test_the_page_works_as_it_is_written(tmp_path, tiny_llama, monkeypatch):
    """In a folder with such files: every YAML block is written where it says, every fastft command runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw" / "cancer").mkdir(parents=True)
    for part in range(2):
        with gzip.open(tmp_path / "raw" / "cancer" / f"{part}.txt.gz", "wt") as f:
            f.write("\n\n".join(text(n) for n in range(part * 20, part * 20 + 20)))
    rows = "".join(json.dumps({"body": text(n)}) + "\n" for n in range(30, 80))  # 10 are there already
    (tmp_path / "raw" / "lungs.jsonl").write_text(rows)
    shutil.copytree(tiny_llama, tmp_path / "models" / "SmolLM2-135M")
    first, second = test_docs.blocks(PAGE, "yaml")
    (tmp_path / "corpus.yaml").write_text(first)
    small = "batch: {size: 4}\ntrain: {steps: 2}\n"
    second = second.replace("max_length: 1024", "max_length: 64")
    second = second.replace("{dir: runs/medical}", "{dir: runs/medical, device: cpu, threads: 1}")
    (tmp_path / "train.yaml").write_text(second + small)
    commands = re.findall(r"^fastft (.*)$", "\n".join(test_docs.blocks(PAGE, "bash")), re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["prepare", "train", "trace"]
    said = [launch.fastft(*command.partition("#")[0].split())[1] for command in commands]
    assert "the same text 10" in said[0] and "80 documents" in said[0]
    assert "cancer: raw/cancer/" in said[2] or "lungs: raw/lungs.jsonl:" in said[2]
    assert (tmp_path / "runs" / "medical" / "model" / "config.json").is_file()


def text(number: int) -> str:
    return f"Page {number}. " + corpora.prose(number, 80)
