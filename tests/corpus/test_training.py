"""Training on a prepared corpus: the same samples as from the files, none that cross a shard, named by file and row."""

import dataclasses
import json
import time
from pathlib import Path

import corpora
import jobs
import numpy as np
import pytest
import torch
import transformers
import vocabularies
import yaml

import launch
from fastft import track
from fastft.corpus import shards
from fastft.corpus.shards import Shard
from fastft.errors import UserError
from fastft.evaluate.trace import trace
from fastft.files import digest


@pytest.fixture
def files(corpus):
    return str(corpus / "train.jsonl")


@pytest.fixture
def prepared(tmp_path, files, tiny_llama):
    return corpora.made(tmp_path, tiny_llama, files, duplicates="keep")


def same_batches(one, other) -> None:
    splits = [task.train_split() for task in (one, other)]
    assert len(splits[0]) == len(splits[1]) > 4 and splits[0].totals == splits[1].totals
    for ids in np.array_split(np.arange(len(splits[0])), 5):
        a, b = (jobs.collate(task, split, ids) for task, split in zip((one, other), splits, strict=True))
        assert torch.equal(a.labels, b.labels)
        assert all(torch.equal(torch.as_tensor(a.inputs[n]), torch.as_tensor(b.inputs[n])) for n in a.inputs)


@pytest.mark.parametrize("truncation", ["split", "truncate", "drop"])
def test_the_same_batches_as_from_the_files(lm_config, prepared, tmp_path, truncation):
    lm_config["data"] |= {"truncation": truncation, "eval": {}, "max_length": 256 if truncation == "drop" else 64}
    one = jobs.task_of(lm_config)
    lm_config["data"] |= {"train": str(prepared.folder), "cache": str(tmp_path / "cache")}
    other = jobs.task_of(lm_config)
    same_batches(one, other)
    counts = [task.train_split().data.meta["counts"] for task in (one, other)]
    for name in ("rows", "truncated", "split", "dropped", "overlong_total", "longest"):
        assert counts[0][name] == counts[1][name], name


def test_masked_lm_takes_the_special_tokens_off(tmp_path, corpus, files):
    """A WordPiece tokenizer with [CLS] and [SEP]: batches and masks are those of the files."""
    wordpiece = vocabularies.word_pieces([Path(files).read_text()], 600)
    folder = tmp_path / "bert"
    transformers.BertTokenizerFast(tokenizer_object=wordpiece._tokenizer).save_pretrained(folder)
    shape = {"vocab_size": 600, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = transformers.BertConfig(**shape, intermediate_size=32, max_position_embeddings=64)
    transformers.BertForMaskedLM(bert).save_pretrained(folder)
    made = corpora.made(tmp_path, folder, files, duplicates="keep")
    assert len(made.manifest["tokens"]["before"]) == len(made.manifest["tokens"]["after"]) == 1
    config = {
        "task": "masked_lm",
        "model": {"path": str(folder)},
        "data": {"train": files, "max_length": 48, "truncation": "split", "chinese_words": "none"},
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "threads": 1},
    }
    one = jobs.task_of(config)
    config["data"] |= {"train": str(made.folder), "cache": str(tmp_path / "cache")}
    other = jobs.task_of(config)
    one.pads = other.pads = True
    same_batches(one, other)
    config["data"]["chinese_words"] = "jieba"
    with pytest.raises(UserError, match="only tokens of WordPiece say"):
        jobs.task_of(config).train_split()


@pytest.fixture
def many_shards(tmp_path, files, tiny_llama, monkeypatch):
    corpora.small_blocks(monkeypatch, 7)
    rows = [json.loads(line)["text"] for line in Path(files).read_text().splitlines()]
    sources = []
    for name, part in (("first", rows[:30]), ("second", rows[30:])):
        sources.append({"path": str(corpora.jsonl(tmp_path / f"{name}.jsonl", part)), "name": name})
    return corpora.made(tmp_path, tiny_llama, sources, shard_tokens=6000)


def test_no_sequence_crosses_a_shard_and_each_is_named_by_its_source(lm_config, many_shards):
    lm_config["data"] |= {"train": str(many_shards.folder), "eval": {}}
    task = jobs.task_of(lm_config)
    split = task.train_split()
    tokens = split.data["tokens"]
    assert len(many_shards.shards) > 5
    for sample in range(len(split)):
        documents = split.data["piece_doc"][split.data["packs"][sample]]
        assert len({tokens.place(int(d))[0] for d in documents}) == 1
        said = {where.partition(":")[0] for where in task.documents(split, sample)}
        assert len(said) == 1 and said <= {"first", "second"}
    assert split.targets.sum() == many_shards.manifest["totals"]["tokens"] - many_shards.manifest["totals"]["documents"]


def test_a_run_names_its_corpus_and_trace_the_rows(lm_config, many_shards, tmp_path):
    lm_config["data"] |= {"train": str(many_shards.folder), "eval": {}}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(lm_config))
    launch.fastft("train", tmp_path / "c.yaml")
    first = next(r for r in track.read(tmp_path / "run") if r["kind"] == "run")
    assert (
        first["corpus"] == [many_shards.digest]
        and first["data"]["train"]["rows"] == many_shards.manifest["totals"]["documents"]
    )
    said = [where for sample in trace(tmp_path / "run", [], 2) for where in sample["documents"]]
    assert said and all("jsonl:" in where for where in said)
    where = said[0].split(" tokens ")[0].partition(": ")[2]
    path, _, row = where.rpartition(":")
    text = json.loads(Path(path).read_text().splitlines()[int(row) - 1])["text"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(lm_config["model"]["path"])
    assert text in corpora.texts_of(many_shards, tokenizer)
    assert any(many_shards.digest in path.read_text() for path in (tmp_path / "run" / "checkpoints").rglob("*.json"))


def test_what_a_corpus_is_not_for(lm_config, prepared, tmp_path, classification_config, corpus, files):
    classification_config["data"]["train"] = str(prepared.folder)
    with pytest.raises(UserError, match="which task classification does not read"):
        jobs.task_of(classification_config).train_split()
    lm_config["data"] |= {"train": [str(prepared.folder), files], "eval": {}}
    with pytest.raises(UserError, match="other sources are not"):
        jobs.task_of(lm_config).train_split()
    lm_config["data"]["train"] = {"path": str(prepared.folder), "split": "train", "columns": {"text": "body"}}
    with pytest.raises(UserError, match="is a prepared corpus, of which split, columns says nothing"):
        jobs.task_of(lm_config).train_split()
    other = transformers.AutoTokenizer.from_pretrained(lm_config["model"]["path"])
    other.add_tokens("<another>")
    other.save_pretrained(tmp_path / "other")
    lm_config["data"]["train"] = str(prepared.folder)
    lm_config["model"]["tokenizer"] = str(tmp_path / "other")
    with pytest.raises(UserError, match="tokenized by another tokenizer"):
        jobs.task_of(lm_config).train_split()


def test_long_documents_are_told_as_from_files(lm_config, prepared):
    lm_config["data"] |= {"train": str(prepared.folder), "eval": {}, "truncation": "error"}
    with pytest.raises(UserError, match=r"texts are longer than max_length = 64 .* first: raw: .*train\.jsonl:1 \("):
        jobs.task_of(lm_config).train_split()


def test_a_torn_shard_is_found_before_training(lm_config, prepared):
    lm_config["data"] |= {"train": str(prepared.folder), "eval": {}}
    jobs.task_of(lm_config).train_split()
    path = prepared.path(0) / "tokens.values.bin"
    data = bytearray(path.read_bytes())
    path.write_bytes(data[:-4])
    with pytest.raises(UserError, match=r"tokens\.values\.bin: is missing or cut short"):
        jobs.task_of(lm_config).train_split()
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    lm_config["data"]["cache"] = str(prepared.folder.parent / "another")
    with pytest.raises(UserError, match="does not match its hash"):
        jobs.task_of(lm_config).train_split()
    del lm_config["data"]["cache"]  # packs are planned there
    with pytest.raises(UserError, match="does not match its hash"):
        jobs.task_of(lm_config).train_split().data.verify()


def big(folder, template, documents: int, length: int) -> None:
    """A corpus of so many documents, its tokens a hole in the file."""
    manifest = dict(template.manifest)
    shard = folder / "shards" / "00000"
    shard.mkdir(parents=True)
    offsets = np.arange(documents + 1, dtype=np.int64) * length
    np.save(shard / "tokens.offsets.npy", offsets)
    np.save(shard / "places.npy", np.zeros((documents, 2), np.int64))
    with open(shard / "tokens.values.bin", "wb") as f:
        f.truncate(int(offsets[-1]) * 2)
    files = {p.name: shards._described(p) for p in shard.iterdir()}
    made = Shard("00000", 0, documents, int(offsets[-1]), 1, files)
    manifest |= {"shards": [dataclasses.asdict(made)], "totals": {"documents": documents, "tokens": 1, "characters": 1}}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": digest(manifest)}))


@pytest.mark.alone
def test_a_billion_tokens_open_as_fast_as_a_million(lm_config, prepared, tmp_path):
    """The first time packs are planned; from then on everything is mapped."""
    seconds = {}
    for tokens in (10**6, 10**9):
        folder = tmp_path / str(tokens)
        big(folder, prepared, tokens // 500, 500)
        lm_config["data"] |= {"train": str(folder), "eval": {}, "cache": str(folder / "cache"), "max_length": 256}
        for time_of in ("first", "again"):
            task = jobs.task_of(lm_config)
            task.processor_key()
            start = time.perf_counter()
            split = task.train_split()
            jobs.collate(task, split, [0, len(split) - 1])
            seconds[tokens, time_of] = time.perf_counter() - start
    assert seconds[10**9, "first"] < seconds[10**6, "first"] + 30  # about 2 s; several times that beside other work
    assert seconds[10**9, "again"] < seconds[10**6, "again"] + 0.5
    print(seconds)
