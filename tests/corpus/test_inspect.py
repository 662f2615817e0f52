"""`fastft inspect`: a corpus, a shard, a document, lengths, a packed batch; `fastft trace --document`."""

import json
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import corpora
import jobs
import numpy as np
import pytest
import transformers
import vocabularies
import yaml

import launch
from fastft.cli.main import main
from fastft.config import Model
from fastft.corpus import inspect, lookup
from fastft.errors import UserError
from fastft.evaluate.batch import batch
from fastft.evaluate.trace import steps_of, trace
from fastft.models import load
from fastft.tasks.base import IGNORE


@pytest.fixture
def made(tmp_path, tiny_llama, monkeypatch):
    """Two sources in several shards, of documents of many lengths; one is there twice."""
    corpora.small_blocks(monkeypatch, 5)
    one = [corpora.prose(n, 5 + 3 * n) for n in range(0, 28, 2)]
    sources = [
        {"path": str(corpora.jsonl(tmp_path / "one.jsonl", one)), "name": "one", "licence": "CC0"},
        {"path": str(corpora.jsonl(tmp_path / "two.jsonl", [*one[5:6], *(corpora.prose(n) for n in range(40, 54))]))},
    ]
    sources[1]["name"] = "two"
    return corpora.made(tmp_path, tiny_llama, sources, shard_tokens=800, duplicates="keep")


@pytest.fixture
def said(capfd):
    """What the verb writes, run in this process."""

    def run(*arguments) -> str:
        with suppress(SystemExit):
            main(["inspect", *map(str, arguments)])
        found = capfd.readouterr()
        return found.out or " ".join(found.err.split())

    return run


def test_what_is_beside_it_is_offered(made, tiny_llama, lm_config, tmp_path, said):
    """A mistyped folder of a corpus, of a model; a step that the run does not have, by the option's own name."""
    whole = made.folder.rename(tmp_path / "medical")
    assert "medcal: is not there. Did you mean 'medical'?" in said(tmp_path / "medcal")
    lm_config["data"] |= {"train": str(tmp_path / "medcal"), "eval": {}}
    path = launch.write_config(tmp_path / "c.yaml", lm_config)
    assert f"Did you mean {whole}? In {tmp_path} there are" in said(path, "--batch", 1)
    lm_config["data"]["train"] = str(whole)
    launch.write_config(tmp_path / "c.yaml", lm_config)
    assert "--batch 99: the run has steps 1 to 4" in said(path, "--batch", 99)


def test_a_model_that_is_not_there_is_told_at_once(tmp_path, monkeypatch):
    """Where the hub has no address; its own library would try again for a minute."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "https://hub.invalid")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    for said, near in (("modles/tiny", "Did you mean 'models/tiny'?"), ("model", "Did you mean 'models'?")):
        start = time.monotonic()
        with pytest.raises(UserError, match=f"tokenizer path {said}: no such folder, .*hub.invalid cannot be") as e:
            load.tokenizer(Model(path=said))
        assert near in str(e.value) and time.monotonic() - start < 5


def test_every_document_is_found_by_its_id_and_its_place(made, tiny_llama):
    tokenizer = inspect.tokenizer_of(made)
    rows = [json.loads(line)["text"] for line in (made.folder.parent / "one.jsonl").read_text().splitlines()]
    assert len(made.shards) > 3
    for number, shard in enumerate(made.shards):
        for row in range(shard.documents):
            found = inspect.document(made, tokenizer, number, row)
            assert found["tokens"] == made.tokens(number)[row].tolist()
            assert (number, row) in lookup.find(made, found["id"])
            assert lookup.find(made, found["where"]) == [(number, row)]
            assert lookup.find(made, found["where"].replace(": ", ":")) == [(number, row)]
            if found["where"].startswith("one"):
                assert found["text"] == rows[int(found["where"].rpartition(":")[2]) - 1]
                assert lookup.find(made, found["where"].partition(": ")[2]) == [(number, row)]
    twice = lookup.find(made, inspect.documents(made, tokenizer, f"one:{made.folder.parent}/one.jsonl:6")[0]["id"])
    assert [made.where(*at).rpartition("/")[2] for at in twice] == ["one.jsonl:6", "two.jsonl:1"]


def test_lengths_are_those_of_the_documents(made):
    found = inspect.lengths(made)
    lengths = np.concatenate([made.tokens(i).lengths() for i in range(len(made.shards))])
    assert found["documents"] == len(lengths) == sum(b["documents"] for b in found["histogram"])
    assert found["tokens"] == lengths.sum() == sum(b["tokens"] for b in found["histogram"])
    for b in found["histogram"]:
        inside = lengths[(lengths >= b["from"]) & (lengths <= b["to"])]
        assert (len(inside), inside.sum()) == (b["documents"], b["tokens"])
    assert (found["shortest"], found["longest"]) == (lengths.min(), lengths.max())
    assert found["quantiles"]["0.5"] == np.sort(lengths)[len(lengths) // 2]


def test_the_verb(said, made, lm_config, tmp_path):
    folder = made.folder
    assert "29 documents" in said(folder) and "CC0" in said(folder)
    shard = said(folder, "--shard", 1)
    assert made.where(1, 0) in shard and made.ids(1)[0].tobytes().hex() in shard
    document = said(folder, "--document", made.ids(1)[0].tobytes().hex())
    assert made.where(1, 0) in document and f"{made.tokens(1)[0][0]}:" in document
    assert json.loads(said(folder, "--lengths", "--json")) == inspect.lengths(made)
    lm_config["data"] |= {"train": str(folder), "eval": {}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(lm_config))
    shown = said(tmp_path / "c.yaml", "--batch", 2)
    assert shown.count("sample ") == 6 and "targets 1-" in shown


def test_what_is_not_there_is_said(said, made, tmp_path):
    one = tmp_path / "one.jsonl"
    for name, why in {
        "0" * 32: "a hash of a text",
        f"one:{one}:99": "Its file was read",
        "one:other.jsonl:1": "source:file:row",
        "nothing": "source:file:row",
    }.items():
        with pytest.raises(UserError, match="holds no document") as e:
            lookup.find(made, name)
        assert why in e.value.hint
    with pytest.raises(UserError, match=r"has .* shards"):
        inspect.shard(made, None, len(made.shards))
    assert "is no corpus that is complete" in said(tmp_path)
    assert "one at a time" in said(made.folder, "--shard", 0, "--lengths")


@pytest.mark.parametrize("packing", ["isolated", "none"])
def test_a_packed_batch_is_what_the_model_sees(made, lm_config, tmp_path, packing):
    """Documents are whole pieces between their bounds, and every token but a document's first one is a target."""
    lm_config["data"] |= {"train": str(made.folder), "eval": {}, "packing": packing}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(lm_config))
    found, traced = batch(tmp_path / "c.yaml", [], 1), trace(tmp_path / "c.yaml", [], 1)
    task = jobs.task_of(lm_config)
    split = task.train_split()
    several = 0
    for entry, other in zip(found, traced, strict=True):
        assert entry["sample"] == other["sample"]
        assert [part["where"] for part in entry["documents"]] == other["documents"]
        several += len(entry["documents"]) > 1
        ends = [part["stop"] for part in entry["documents"]]
        starts = [part["start"] for part in entry["documents"]]
        assert starts == [0, *ends[:-1]] and ends[-1] == len(entry["tokens"])
        assert entry["targets"] == [at for at in range(len(entry["tokens"])) if at not in starts]
        assert entry["labels"] == [entry["tokens"][at] for at in entry["targets"]]
        made_batch = jobs.collate(task, split, [entry["sample"]])
        assert int((made_batch.labels != IGNORE).sum()) == len(entry["targets"])
    assert bool(several) == (packing == "isolated")


def test_a_masked_batch(tmp_path, made, corpus):
    wordpiece = vocabularies.word_pieces([(tmp_path / "one.jsonl").read_text()], 300)
    folder = tmp_path / "bert"
    transformers.BertTokenizerFast(tokenizer_object=wordpiece._tokenizer).save_pretrained(folder)
    shape = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(**shape, intermediate_size=32, max_position_embeddings=64)
    transformers.BertForMaskedLM(bert).save_pretrained(folder)
    config = {
        "task": "masked_lm",
        "model": {"path": str(folder)},
        "data": {"train": str(tmp_path / "one.jsonl"), "max_length": 64, "truncation": "split"},
        "batch": {"size": 4},
        "train": {"steps": 2},
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "threads": 1},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    for packing in ("isolated", "none"):
        found = batch(tmp_path / "c.yaml", [f"data.packing={packing}", "data.replace_random=0"], 1)
        assert any(len(entry["documents"]) > 1 for entry in found) == (packing == "isolated")
        for entry in found:
            for part in entry["documents"]:
                tokens = entry["tokens"][part["start"] : part["stop"]]
                assert part["text"].startswith("[CLS]") and part["text"].endswith("[SEP]") and part["targets"]
                assert tokens.count(tokens[0]) == 1  # no other document begins in it


def test_trace_of_a_document_is_the_inverse_of_trace_of_a_step(lm_config, made, tmp_path):
    """Over a whole small run of several epochs: every step's documents, and every document's steps."""
    lm_config["data"] |= {"train": str(made.folder), "eval": {}}
    lm_config["train"] = {"epochs": 2, "log_every": 1}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(lm_config))
    launch.fastft("train", tmp_path / "c.yaml")
    inverse(tmp_path / "run", [made.where(i, row) for i, s in enumerate(made.shards) for row in range(s.documents)])
    found = steps_of(tmp_path / "run", [], made.ids(1)[2].tobytes().hex())
    assert found == steps_of(tmp_path / "run", [], made.where(1, 2))
    assert len(found["steps"]) >= 2 and {entry["epoch"] for entry in found["steps"]} == {0, 1}
    twice = steps_of(tmp_path / "run", [], made.ids(0)[5].tobytes().hex())  # the same text in another source
    assert len(twice["documents"]) == 2
    output = launch.fastft("trace", tmp_path / "run", "--document", made.where(1, 2))[1]
    assert f"step {found['steps'][0]['step']}, sample {found['steps'][0]['sample']}: {made.where(1, 2)}" in output
    with pytest.raises(UserError, match="holds no document"):
        steps_of(tmp_path / "run", [], "one: nothing.jsonl:1")


def inverse(run: Path, names: list[str]) -> None:
    steps = max(r["step"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "step" in r)
    forward, back = Counter(), Counter()
    for step in range(1, steps + 1):
        for sample in trace(run, [], step):
            forward.update((step, sample["sample"], where) for where in sample["documents"])
    for name in names:
        found = steps_of(run, [], name)
        assert found["looked_at"] == steps
        back.update((entry["step"], entry["sample"], where) for entry in found["steps"] for where in entry["documents"])
    assert forward == back


def test_trace_of_rows_of_plain_files(lm_config, classification_config, tmp_path):
    """Of a configuration all steps are looked at; packed or not."""
    for name, config in (("lm", lm_config), ("classes", classification_config)):
        config["train"] = {"steps": 9}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        file = config["data"]["train"]
        steps = [
            (step, sample["sample"], where)
            for step in range(1, 10)
            for sample in trace(path, [], step)
            for where in sample["documents"]
            if where.partition(" ")[0] == f"{file}:3"
        ]
        found = steps_of(path, [], f"{file}:3")["steps"]
        assert steps and [(e["step"], e["sample"], w) for e in found for w in e["documents"]] == steps
        with pytest.raises(UserError, match="has no document"):
            steps_of(path, [], f"{file}:99999")
    with pytest.raises(UserError, match="which are not packed"):
        batch(path, [], 1)
