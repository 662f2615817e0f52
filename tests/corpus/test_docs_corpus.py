"""docs/corpus.md: its files and its commands, from raw files to a model."""

import gzip
import json
import re
import shlex
import shutil

import corpora
import test_docs
import test_importing

import launch
from fastft.corpus.shards import Corpus

PAGE = launch.ROOT / "docs" / "corpus.md"
SMALL = {"max_length: 1024": "max_length: 64", "{dir: runs/medical}": "{dir: runs/medical, device: cpu, threads: 1}"}


def test_the_page_works_as_it_is_written(tmp_path, tiny_llama, monkeypatch):
    """In a folder with such files: every YAML block is written where it says, every fastft command runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "raw" / "cancer").mkdir(parents=True)
    for part in range(2):
        with gzip.open(tmp_path / "raw" / "cancer" / f"{part}.txt.gz", "wt") as f:
            f.write("\n\n".join(text(n) for n in range(part * 20, part * 20 + 20)))
    texts = [text(n) for n in range(30, 80)] + [text(79) + " Again."]  # 10 are there already, one nearly
    (tmp_path / "raw" / "lungs.jsonl").write_text("".join(json.dumps({"body": one}) + "\n" for one in texts))
    (tmp_path / "eval").mkdir()
    exam = {"question": f"What follows? {corpora.prose(3, 80)[100:300]}", "answer": "This."}
    (tmp_path / "eval" / "exam.jsonl").write_text(json.dumps(exam) + "\n")
    (tmp_path / "eval" / "notes.csv").write_text("id,note\n1," + corpora.prose(5, 40).upper() + "\n")
    shutil.copytree(tiny_llama, tmp_path / "models" / "SmolLM2-135M")
    for block in test_docs.blocks(PAGE, "yaml"):
        name = re.match(r"# (\S+\.yaml)\n", block)[1]
        for whole, small in SMALL.items():
            block = block.replace(whole, small)
        more = "batch: {size: 4}\ntrain: {steps: 2}\n" if name == "train.yaml" else ""
        (tmp_path / name).write_text(block + more)
    commands = re.findall(r"^fastft (.*)$", "\n".join(test_docs.blocks(PAGE, "bash")), re.MULTILINE)
    said = {}
    for command in commands:
        if command == "prepare less.yaml":
            taken = Corpus(tmp_path / "corpora" / "near")
            (tmp_path / "removed.txt").write_text(taken.ids(1)[3].tobytes().hex())
        if command.startswith("import-tokens"):
            (tmp_path / "raw" / "tokens").mkdir()
            taken = [Corpus(tmp_path / "corpora" / "near").tokens(0)[i] for i in range(9)]
            test_importing.ds(tmp_path / "raw" / "tokens" / "a.ds", taken)
        said[command] = launch.fastft(*shlex.split(command, comments=True))[1]
    assert "the same text 10" in said["prepare corpus.yaml"] and "81 documents" in said["prepare corpus.yaml"]
    near = said["prepare near.yaml"]
    assert "the same text 10, nearly the same text 1" in near and "80 documents" in near
    assert "text of exam 1" in said["prepare clean.yaml"] and "text of notes 1" in said["prepare clean.yaml"]
    traced, back, packed, whole, lengths, shard, document = (
        output for command, output in said.items() if command.startswith(("trace", "inspect"))
    )
    assert "cancer: raw/cancer/" in traced or "lungs: raw/lungs.jsonl:" in traced
    assert "2 steps learn from lungs: raw/lungs.jsonl:20" in back and "targets 1-" in packed
    assert "CC BY 4.0" in whole and "81 documents" in lengths and "shard 0 of source cancer" in shard
    assert "Page 49." in document
    assert "79 documents" in said["prepare less.yaml"] and "1 documents were removed" in said["prepare less.yaml"]
    (imported,) = (output for command, output in said.items() if command.startswith("import-tokens"))
    assert "9 documents" in imported and "9 of 9 documents gives the same tokens" in imported
    assert (tmp_path / "runs" / "medical" / "model" / "config.json").is_file()


def text(number: int) -> str:
    return f"Page {number}. " + corpora.prose(number, 80)
