"""`fastft prepare`: what goes in, what is counted, what comes out, whoever does it and however often it is killed."""

import gzip
import json
import multiprocessing
import os
import random
import signal
import time

import corpora
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers

from fastft.config import Source
from fastft.config.corpus import load_corpus
from fastft.corpus import build, shards
from fastft.corpus.build import prepare
from fastft.corpus.shards import MANIFEST, corpora_of
from fastft.errors import UserError

RULES = {
    "unicode": True,
    "whitespace": True,
    "length": {"min_words": 20},
    "repetition": {"duplicate_ngrams": {10: 0.9}},
}


@pytest.fixture(scope="session")
def tokenizer(tiny_llama):
    return transformers.AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture
def raw(tmp_path):
    """A folder with a file of every kind, 30 documents each where a file holds several."""
    folder = tmp_path / "raw"
    folder.mkdir()
    texts = [corpora.prose(n) for n in range(200)]
    with gzip.open(folder / "a.txt.gz", "wt") as f:
        f.write("\n\n".join(texts[:30]))
    corpora.jsonl(folder / "b.jsonl", texts[30:60])
    rows = "".join(f'{n},"{t}"\n' for n, t in enumerate(texts[60:90]))
    (folder / "c.csv").write_text("id,text\n" + rows)
    pq.write_table(pa.table({"text": texts[90:120]}), folder / "d.parquet")
    (folder / "e.html").write_text(f"<html><style>p {{}}</style><p>{texts[120]}</p><script>no</script></html>")
    items = "".join(f"<doc><p>{text}</p></doc>" for text in texts[121:151])
    (folder / "f.xml").write_text(f"<docs>{items}</docs>")
    (folder / "g.json").write_text(json.dumps([{"text": text} for text in texts[151:180]]))
    return folder


SOURCE = {"path": "", "name": "all", "licence": "CC0", "element": "doc"}


def of(raw):
    return [SOURCE | {"path": str(raw)}]


def test_every_format_becomes_tokens_that_say_the_text(tmp_path, raw, tiny_llama, tokenizer):
    corpus = corpora.made(tmp_path, tiny_llama, of(raw))
    found = corpora.texts_of(corpus, tokenizer)
    assert sorted(found) == sorted(corpora.prose(n) for n in range(180))
    assert all(corpus.tokens(0)[i][-1] == tokenizer.eos_token_id for i in range(180))
    manifest = corpus.manifest
    assert manifest["sources"][0]["licence"] == "CC0" and manifest["totals"]["documents"] == 180
    assert corpus.where(0, 0) == f"all: {raw}/a.txt.gz:1" and corpus.where(0, 91) == f"all: {raw}/d.parquet:row 2"
    assert corpus.where(0, 120) == f"all: {raw}/e.html"
    corpus.verify()


def test_zstandard(tmp_path, raw, tiny_llama, tokenizer):
    zstandard = pytest.importorskip("zstandard", reason="pip install 'fastft[data]'")
    for name in ("b.jsonl", "f.xml"):  # as two frames
        content = (raw / name).read_bytes()
        packed = zstandard.compress(content[:1000]) + zstandard.compress(content[1000:])
        (tmp_path / f"{name}.zst").write_bytes(packed)
    sources = [SOURCE | {"path": str(tmp_path / f"{name}.zst")} for name in ("b.jsonl", "f.xml")]
    found = corpora.texts_of(corpora.made(tmp_path, tiny_llama, sources), tokenizer)
    assert found == [corpora.prose(n) for n in (*range(30, 60), *range(121, 151))]
    (tmp_path / "b.jsonl.zst").write_bytes(packed[:-20])
    with pytest.raises(UserError, match=r"b\.jsonl\.zst: cannot be read as jsonl: the file ends within|before its Zst"):
        corpora.made(tmp_path / "2", tiny_llama, sources[:1])


def test_urls(tmp_path, tiny_llama, tokenizer):
    fsspec = pytest.importorskip("fsspec")
    fs = fsspec.filesystem("memory")
    for number in range(3):
        with fs.open(f"/bucket/part/{number}.jsonl", "w") as f:
            f.write(json.dumps({"text": corpora.prose(number)}) + "\n")
    with fs.open("/bucket/part/notes.bin", "w") as f:
        f.write("no data")
    try:
        corpus = corpora.made(tmp_path, tiny_llama, "memory://bucket/part")
        assert corpora.texts_of(corpus, tokenizer) == [corpora.prose(n) for n in range(3)]
        assert corpus.where(0, 2) == "raw: memory://bucket/part/2.jsonl:1" or "memory:///bucket" in corpus.where(0, 2)
        some = corpora.made(tmp_path / "2", tiny_llama, "memory://bucket/part/[01].jsonl")
        assert some.manifest["totals"]["documents"] == 2
        with pytest.raises(UserError, match="memory://bucket/none: is not there"):
            corpora.made(tmp_path / "3", tiny_llama, "memory://bucket/none")
    finally:
        fs.rm("/bucket", recursive=True)


def test_rules_count_what_they_do_and_show_some_of_it(tmp_path, tiny_llama):
    texts = [corpora.prose(0), "too short", corpora.prose(1) + "\t \t end", corpora.prose(0), "", corpora.prose(2)]
    corpora.jsonl(tmp_path / "r.jsonl", texts)
    corpus = corpora.made(tmp_path, tiny_llama, str(tmp_path / "r.jsonl"), rules=RULES)
    rules = corpus.manifest["rules"]
    found = {name: [rule[n] for n in ("in", "kept", "changed", "dropped")] for name, rule in rules.items()}
    assert found == {
        "reading": [6, 5, 0, 1],
        "unicode": [5, 5, 0, 0],
        "whitespace": [5, 5, 1, 0],
        "length": [5, 4, 0, 1],
        "repetition": [4, 4, 0, 0],
        "tokens": [4, 4, 0, 0],
        "duplicates": [4, 3, 0, 1],
    }
    where = f"{tmp_path}/r.jsonl"
    assert rules["length"]["samples"] == [
        {"where": f"{where}:2", "reason": "fewer than 20 characters", "text": "too short"}
    ]
    assert rules["duplicates"]["samples"][0]["where"] == f"{where}:4" and rules["reading"]["reasons"] == {"empty": 1}
    kept = corpora.made(tmp_path / "2", tiny_llama, str(tmp_path / "r.jsonl"), duplicates="keep")
    assert kept.manifest["totals"]["documents"] == 5


@pytest.fixture
def small_blocks(monkeypatch):
    corpora.small_blocks(monkeypatch, 7)


SMALL = {"rules": RULES, "shard_tokens": 1500}


def test_the_same_bytes_from_any_number_of_workers(tmp_path, raw, tiny_llama, small_blocks):
    """One source is one folder, the other files of it again: duplicates across sources."""
    corpora.jsonl(tmp_path / "near.jsonl", [corpora.prose(n) + " again" for n in range(10, 40)])
    paths = {"again": raw / "b.jsonl", "third": raw / "c.csv", "near": tmp_path / "near.jsonl"}
    sources = [*of(raw), *({"path": str(path), "name": name} for name, path in paths.items())]
    found = []
    for workers, duplicates in ((1, "near"), (4, "near"), (1, "keep"), (2, "keep")):
        settings = SMALL | {"duplicates": duplicates}
        corpus = corpora.made(tmp_path / f"{workers}{duplicates}", tiny_llama, sources, workers=workers, **settings)
        found.append(corpora.content(corpus.folder))
    assert found[0] == found[1] and found[2] == found[3]
    near = json.loads((tmp_path / "4near" / "out" / MANIFEST).read_text())["rules"]["duplicates"]
    assert near["reasons"]["nearly the same text"] == near["pairs"] == 30
    assert len(corpus.shards) > 6 and all(shard.tokens <= 1500 for shard in corpus.shards)
    assert {shard.source for shard in corpus.shards} == {0, 1, 2, 3}


def _killed(config, seed: int, blocks: int | None) -> None:
    """In a process of its own: kill it after some blocks, or after a time."""

    def report(made):
        nonlocal blocks
        if blocks is not None:
            blocks -= 1
            if blocks < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    prepare(config, report=report)


def _kill_until_done(config, rng: random.Random, kills: int) -> int:
    fork = multiprocessing.get_context("fork")
    killed = 0
    for number in range(kills):
        blocks = rng.randrange(20) if number % 2 else None
        child = fork.Process(target=_killed, args=(config, number, blocks))
        child.start()
        if blocks is None:
            time.sleep(rng.random() * 0.4)
            child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        assert child.exitcode in (0, -signal.SIGKILL)
        if child.exitcode == -signal.SIGKILL:
            assert not shards.is_corpus(build.Path(config.output))
    return killed


@pytest.mark.parametrize(
    "duplicates, kills", [("exact", 3), ("near", 6), pytest.param("near", 30, marks=pytest.mark.long)]
)
def test_killed_anywhere_and_run_again_gives_the_same_bytes(tmp_path, raw, tiny_llama, small_blocks, duplicates, kills):
    settings = {**SMALL, "duplicates": duplicates}
    texts = [corpora.prose(n) + " again" * (n % 2) for n in range(20, 300)]  # some are duplicates of a.txt.gz
    corpora.jsonl(raw / "b.jsonl", texts)
    whole = corpora.made(tmp_path / "whole", tiny_llama, of(raw), **settings)
    rng = random.Random(kills)
    killed = 0
    for attempt in range(kills // 3):
        config = corpora.config_of(tmp_path / f"{attempt}", tiny_llama, of(raw), **settings)
        (tmp_path / f"{attempt}").mkdir()
        killed += _kill_until_done(config, rng, 3)
        corpus = prepare(config)
        assert corpora.content(corpus.folder) == corpora.content(whole.folder)
    assert killed >= kills // 3


def test_what_is_done_stays_and_nothing_is_written_twice(tmp_path, raw, tiny_llama, small_blocks):
    config = corpora.config_of(tmp_path, tiny_llama, of(raw), **SMALL)
    corpus = prepare(config)
    times = {path: path.stat().st_mtime_ns for path in corpus.folder.rglob("*")}
    assert prepare(config).digest == corpus.digest
    assert {path: path.stat().st_mtime_ns for path in corpus.folder.rglob("*")} == times
    corpora.jsonl(raw / "b.jsonl", ["another text " * 20])
    with pytest.raises(UserError, match="made from other files or settings"):
        prepare(config)
    again = prepare(config, overwrite=True)
    assert again.digest != corpus.digest and again.manifest["totals"]["documents"] < 180


@pytest.mark.parametrize("how", ["cut", "swapped", "flipped"])
def test_a_torn_or_swapped_shard_is_found(tmp_path, raw, tiny_llama, small_blocks, how):
    corpus = corpora.made(tmp_path, tiny_llama, of(raw), **SMALL)
    first = corpus.path(0) / "tokens.values.bin"
    data = first.read_bytes()
    if how == "cut":
        first.write_bytes(data[:-2])
    elif how == "swapped":
        sizes = {i: (corpus.path(i) / "ids.npy").stat().st_size for i in range(len(corpus.shards))}
        a, b = next((i, j) for i in sizes for j in sizes if i < j and sizes[i] == sizes[j])
        first = corpus.path(a) / "ids.npy"
        first.write_bytes((corpus.path(b) / "ids.npy").read_bytes())
    else:
        first.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(UserError, match=str(first)):
        shards.Corpus(corpus.folder)


def test_a_flipped_byte_in_the_middle_is_found_by_verify(tmp_path, raw, tiny_llama):
    corpus = corpora.made(tmp_path, tiny_llama, of(raw))
    path = corpus.path(0) / "tokens.values.bin"
    data = bytearray(path.read_bytes())
    assert len(data) > 2 * shards.PROBED
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not match its hash"):
        shards.Corpus(corpus.folder).verify()


def test_what_was_written_down_and_then_changed_is_made_anew(tmp_path, raw, tiny_llama, small_blocks, caplog):
    """And no rules at all are written as nothing."""
    whole = corpora.made(tmp_path / "whole", tiny_llama, of(raw), **SMALL)
    config = corpora.config_of(tmp_path, tiny_llama, of(raw), **SMALL)
    with pytest.raises(ZeroDivisionError):
        prepare(config, report=_stop_after_shards(2))
    progress = tmp_path / "out" / "progress.json"
    found = json.loads(progress.read_text())
    progress.write_text(json.dumps(found | {"position": {"source": 0, "fiel": 3}}))
    assert corpora.content(prepare(config).folder) == corpora.content(whole.folder)
    assert "progress.json: is not as it was written" in caplog.text
    assert not list(tmp_path.glob("*.lock")) and not (tmp_path / "out" / ".near").exists()
    nothing = corpora.config_of(tmp_path, tiny_llama, of(raw), rules=None, duplicates=None)
    assert nothing.rules.chosen() == {} and nothing.duplicates.exact


def _stop_after_shards(count: int):
    def report(made):
        if len(made.shards) >= count:
            raise ZeroDivisionError

    return report


def test_the_command(tmp_path, raw, tiny_llama):
    import launch

    (tmp_path / "corpus.yaml").write_text(
        f"output: {tmp_path}/out\ntokenizer: {tiny_llama}\nsources: {{path: '{raw}/*.jsonl', licence: CC0}}\n"
        "rules: [unicode, length]\n"
    )
    _, output = launch.fastft("prepare", tmp_path / "corpus.yaml", "workers=2", "--json")
    said = json.loads(output.strip().splitlines()[-1])
    assert said["totals"]["documents"] == 30 and said["sources"][0]["name"] == "raw"
    _, output = launch.fastft("prepare", tmp_path / "corpus.yaml")
    assert said["manifest"] in output and "30 documents" in output


@pytest.mark.parametrize(
    "change, said",
    [
        ("rules: {lenght: true}", "rules.lenght: unknown key. Did you mean 'length'?"),
        ("rules: [length, {quality: {min_words: -1}}]", "rules.quality.min_words"),
        ("tokeniser: x", "tokeniser: unknown key"),
        ("sources: {dataset: a/b}", "a corpus is made from files"),
        ("sources: nowhere/*.txt", "no file matches"),
        ("sources: []", "sources"),
        ("sources: {path: x.txt, columns: {text: body}}", "columns: nothing is renamed here"),
        ("rules: {length: {min_words: 9, max_words: 3}}", "min_words: 9 is above max_words: 3"),
        ("rules: {quality: {min_word_length: 9, max_word_length: 3}}", "min_word_length: 9.0 is above"),
        ("rules: {quality: {stop_words: [und]}}", "min_stop_words: 2 of 1 stop_words"),
    ],
)
def test_mistakes_in_the_file(tmp_path, change, said):
    key = change.partition(":")[0]
    lines = {"output": "output: out", "tokenizer": "tokenizer: x", "sources": "sources: x.txt"} | {key: change}
    (tmp_path / "c.yaml").write_text("\n".join(lines.values()))
    with pytest.raises(UserError) as e:
        load_corpus(tmp_path / "c.yaml")
    assert said in str(e.value) and "c.yaml" in str(e.value)


def test_ids_are_those_of_the_tokenizer(tmp_path, tiny_llama, tokenizer):
    """Documents as causal_lm encodes them: special tokens in the text, and the end-of-sequence token once."""
    texts = ["a plain text", "it ends by itself<eos>", "<eos>it begins so", "naïve 中文 \U0001f600", "in <pad> it"]
    corpora.jsonl(tmp_path / "t.jsonl", texts)
    corpus = corpora.made(tmp_path, tiny_llama, str(tmp_path / "t.jsonl"))
    eos = tokenizer.eos_token_id
    for i, text in enumerate(texts):
        ids = tokenizer(text)["input_ids"]
        assert corpus.tokens(0)[i].tolist() == (ids if ids[-1] == eos else [*ids, eos])
    assert corpus.dtype == np.dtype("<u2")
    assert corpus.manifest["rules"]["tokens"]["found"] == {"special tokens in the text": 3}


def test_special_tokens_as_plain_text(tmp_path, tiny_llama):
    """A tokenizer that says so is heeded, as in training on the files."""
    folder = tmp_path / "tokenizer"
    transformers.AutoTokenizer.from_pretrained(tiny_llama, split_special_tokens=True).save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "in <pad> it, and <eos> is not the end"
    corpora.jsonl(tmp_path / "t.jsonl", [text])
    corpus = corpora.made(tmp_path, folder, str(tmp_path / "t.jsonl"))
    ids = tokenizer(text)["input_ids"]
    assert corpus.tokens(0)[0].tolist() == [*ids, tokenizer.eos_token_id] and tokenizer.pad_token_id not in ids
    assert "split_special_tokens" in corpus.manifest["tokens"]["because"]
    assert "found" not in corpus.manifest["rules"]["tokens"]


def test_a_pattern_is_one_source_and_every_file_is_read_once(tmp_path, tiny_llama):
    (tmp_path / "raw" / "more").mkdir(parents=True)
    for n, folder in enumerate(("raw", "raw/more", "raw")):
        corpora.jsonl(tmp_path / folder / f"{n}.jsonl", [corpora.prose(n)])
    (tmp_path / "raw" / "notes.lock").write_text("no data")
    corpus = corpora.made(tmp_path, tiny_llama, str(tmp_path / "raw" / "**"), duplicates="keep")
    (source,) = corpus.manifest["sources"]
    assert len(source["files"]) == 3 and source["documents"] == 3 and len(corpus.shards) == 1
    by_url = corpora.config_of(tmp_path, tiny_llama, f"file://{tmp_path}/raw/0.jsonl")
    assert by_url.sources[0].path == f"{tmp_path}/raw/0.jsonl"
    with pytest.raises(UserError, match="no file matches"):
        corpora.made(tmp_path, tiny_llama, str(tmp_path / "raw" / "*.none"))


def test_what_is_not_whole_is_told(tmp_path, tiny_llama):
    """A byte in the middle of a shard; a manifest that is cut short, which is prepared anew."""
    source = str(corpora.jsonl(tmp_path / "t.jsonl", [corpora.prose(n, 400) for n in range(90)]))
    whole = corpora.made(tmp_path, tiny_llama, source)
    file, before = whole.path(0) / "tokens.values.bin", corpora.content(tmp_path / "out")
    with open(file, "r+b") as f:
        f.seek(file.stat().st_size // 2)
        f.write(b"\xff\xff")
    with pytest.raises(UserError, match=r"tokens.values.bin: does not match its hash .*\n.*--overwrite"):
        corpora.made(tmp_path, tiny_llama, source)
    manifest = tmp_path / "out" / MANIFEST
    manifest.write_bytes(manifest.read_bytes()[:-100])
    with pytest.raises(UserError, match="is a corpus that is not complete"):
        corpora_of("train", [Source(path=str(tmp_path / "out"))])
    corpora.made(tmp_path, tiny_llama, source)
    assert corpora.content(tmp_path / "out") == before


def test_long_lines_of_wide_encodings_and_of_csv(tmp_path, tiny_llama):
    """Only the row is left out; a csv's is refused, for it may be a part of one."""
    rows = [json.dumps({"text": text}) for text in (corpora.prose(1), "x" * 5000, corpora.prose(2))]
    (tmp_path / "wide.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-16-le")
    source = {"path": str(tmp_path / "wide.jsonl"), "encoding": "utf-16-le"}
    assert corpora.made(tmp_path, tiny_llama, source, max_document_bytes=1024).manifest["totals"]["documents"] == 2
    (tmp_path / "a.csv").write_text('text\n"short"\n"' + "x" * 9000 + '\n y"\n')
    with pytest.raises(UserError, match=r"a.csv:3: a line is longer than 8 times max_document_bytes"):
        prepare(corpora.config_of(tmp_path, tiny_llama, str(tmp_path / "a.csv"), max_document_bytes=1024), True)
    with pytest.raises(UserError, match="'klingon' is no text encoding"):
        corpora.config_of(tmp_path, tiny_llama, {"path": "a.csv", "encoding": "klingon"})
