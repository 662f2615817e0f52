"""Files that are broken, huge or not there: counted, or told by name; never half a corpus."""

import gzip
import json
import multiprocessing
import os
import resource
import signal
import sys

import corpora
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import launch
from fastft.corpus import shards, told
from fastft.corpus.build import prepare
from fastft.errors import UserError

GOOD = [corpora.prose(n) for n in range(5)]


@pytest.fixture
def attempt(tmp_path, tiny_llama):
    """What is said of a folder with one bad file beside a good one; with unreadable: skip, the corpus."""

    def run(name: str, content: bytes, **settings):
        folder = tmp_path / "raw"
        folder.mkdir(exist_ok=True)
        corpora.jsonl(folder / "a.jsonl", GOOD)
        (folder / name).write_bytes(content)
        config = corpora.config_of(tmp_path, tiny_llama, settings.pop("source", {"path": str(folder)}), **settings)
        try:
            return prepare(config, overwrite=True)
        except UserError as e:
            assert not shards.is_corpus(tmp_path / "out")
            return str(e)

    return run


CUT = gzip.compress(b"".join(json.dumps({"text": corpora.prose(n)}).encode() + b"\n" for n in range(9, 2000)))[:-900]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("latin.txt", "naïve café".encode("latin-1"), "utf-8"),
        ("utf16.txt", "text".encode("utf-16"), "is UTF-16"),
        ("binary.txt", b"\x7fELF\0\0\0\1" * 100, "zero bytes: it is binary"),
        ("cut.jsonl.gz", CUT, "end-of-stream"),
        ("broken.jsonl.gz", CUT[:500] + b"!!!!" + CUT[504:], "cannot be read as jsonl"),
        ("bad.jsonl", b'{"text": "fine, and long enough"}\n{"text": \n', "bad.jsonl:2: broken JSON"),
        ("bad.parquet", b"PAR1 no, it is not", "not a valid Parquet file"),
        ("bad.xml", b"<docs><doc>text</doc>", "broken XML"),
        ("bad.csv", b"id,text\n1\n", "bad.csv:2: 1 cells"),
    ],
)
def test_a_file_that_cannot_be_read(attempt, name, content, said):
    told = attempt(name, content)
    assert isinstance(told, str) and name in told and said in told and "unreadable: skip" in told
    corpus = attempt(name, content, unreadable="skip")
    assert corpus.manifest["totals"]["documents"] >= len(GOOD)
    files = {entry["file"].rpartition("/")[2]: entry for entry in corpus.manifest["sources"][0]["files"]}
    assert said in files[name]["not_read_to_its_end"] and "not_read_to_its_end" not in files["a.jsonl"]


def test_another_encoding_is_read_when_it_is_said(attempt, tmp_path):
    source = {"path": str(tmp_path / "raw" / "l.txt"), "encoding": "gbk", "documents": "line"}
    corpus = attempt("l.txt", "中文的文件内容\n第二行".encode("gbk"), source=source)
    assert corpus.manifest["totals"]["characters"] == 10


def test_empty_files_and_rows_without_text(attempt):
    rows = [
        {"text": ""},
        {"text": None},
        {"text": 5},
        {"other": 1},
        {"text": "half \ud83d of it"},
        {"text": GOOD[0] + "!"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in [{"text": "one more text"}, *rows])
    corpus = attempt("b.jsonl", lines.encode())
    reading = corpus.manifest["rules"]["reading"]
    assert reading["reasons"] == {"empty": 2, "half a character": 1, "no such column": 1, "not text": 1}
    assert corpus.manifest["totals"]["documents"] == 7
    corpus = attempt("b.jsonl", b"")
    assert corpus.manifest["totals"]["documents"] == 5
    empty = [entry["file"] for entry in corpus.manifest["sources"][0]["files"] if "holds_no_row" in entry]
    assert len(empty) == 1 and empty[0].endswith("b.jsonl") and told.summary(corpus)["without_a_row"] == empty


def test_nothing_is_left(attempt, tmp_path):
    told = attempt("b.txt", b"", source={"path": str(tmp_path / "raw" / "b.txt")})
    assert "no document is left" in told
    assert "There is none in the files" in told
    told = attempt("a.txt", b"some text", rules={"length": {"min_words": 500}})
    assert "no document is left" in told
    assert "length: 6 of 6 (fewer than 500 words 5, fewer than 20 characters 1)" in told


def test_a_column_that_is_not_there(attempt):
    told = attempt("b.jsonl", b'{"body": "some text"}\n' * 300)
    assert "b.jsonl:1: no column 'text'" in told and "Set text" in told
    first = attempt("b.jsonl", b'{"body": "some text"}\n' + json.dumps({"text": "and a text"}).encode())
    last = attempt("b.jsonl", json.dumps({"text": "and a text"}).encode() + b'\n{"body": "some text"}\n')
    for corpus in (first, last):
        assert corpus.manifest["rules"]["reading"]["reasons"] == {"no such column": 1}
        assert corpus.manifest["totals"]["documents"] == len(GOOD) + 1


def test_a_loop_of_links_and_a_link_to_nothing(attempt, tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "loop").symlink_to(tmp_path / "raw")
    (tmp_path / "raw" / "gone.txt").symlink_to(tmp_path / "nothing")
    assert "gone.txt: is a link to nothing" in attempt("b.txt", b"one more text")
    (tmp_path / "raw" / "gone.txt").unlink()
    assert attempt("b.txt", b"one more text").manifest["totals"]["documents"] == 6


@pytest.mark.parametrize("what", ["gone", "changed"])
def test_a_file_that_goes_or_changes_while_it_is_read(tmp_path, tiny_llama, monkeypatch, what):
    corpora.small_blocks(monkeypatch, 2)
    (tmp_path / "raw").mkdir()
    for name in ("a", "b"):
        corpora.jsonl(tmp_path / "raw" / f"{name}.jsonl", [text + name for text in GOOD])
    second = tmp_path / "raw" / "b.jsonl"

    def report(made):
        if what == "gone":
            second.unlink(missing_ok=True)
        elif made.position.file == 0:
            corpora.jsonl(second, GOOD)

    config = corpora.config_of(tmp_path, tiny_llama, str(tmp_path / "raw"))
    with pytest.raises(UserError, match=r"b\.jsonl: (cannot be read|changed while it was read)"):
        prepare(config, report=report)
    assert not shards.is_corpus(tmp_path / "out")


def test_an_output_that_is_read_or_holds_what_is_read(tmp_path, tiny_llama):
    raw = tmp_path / "raw"
    raw.mkdir()
    corpora.jsonl(raw / "a.jsonl", GOOD)
    (tmp_path / "link").symlink_to(raw)
    for output, path in (
        (raw, raw),
        (raw / "inside", raw),
        (tmp_path / "link", raw),
        (tmp_path / "link" / "x", raw),
        (raw, raw / "a.jsonl"),
        (tmp_path, raw / "a.jsonl"),
        (tmp_path, tmp_path / "link" / "a.jsonl"),
        (raw / "a.jsonl", raw / "a.jsonl"),
    ):
        config = corpora.config_of(tmp_path, tiny_llama, str(path)).changed(output=str(output))
        with pytest.raises(UserError, match="Choose another output"):
            prepare(config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"holds other files: thesis\.tex"):
        prepare(corpora.config_of(tmp_path, tiny_llama, str(raw)).changed(output=str(tmp_path / "mine")))
    assert sorted(os.listdir(raw)) == ["a.jsonl"] and len((raw / "a.jsonl").read_text().splitlines()) == 5


def _with_small_disk(config, results):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    try:
        prepare(config)
    except Exception as e:
        results.put(repr(e))


def test_a_full_disk_is_told_and_the_corpus_is_made_when_there_is_room(tmp_path, tiny_llama, monkeypatch):
    corpora.small_blocks(monkeypatch, 50)
    raw = corpora.jsonl(tmp_path / "a.jsonl", [corpora.prose(n, 200) for n in range(400)])
    whole = corpora.made(tmp_path / "whole", tiny_llama, str(raw))
    (tmp_path / "full").mkdir()
    config = corpora.config_of(tmp_path / "full", tiny_llama, str(raw))
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    child = fork.Process(target=_with_small_disk, args=(config, results))
    child.start()
    said = results.get(timeout=60)
    child.join()
    assert "UserError" in said and "no space left for the corpus" in said and "bytes left" in said
    assert corpora.content(prepare(config).folder) == corpora.content(whole.folder)


def test_documents_that_are_too_long_are_split_or_left_out(attempt, tmp_path):
    """txt is split; rows of other formats are left out and counted by their place."""
    words = " ".join(f"word{i}" for i in range(1000))
    limit = {"max_document_bytes": 2000}
    for kind, ends in (("line", "\n"), ("blank_line", "\n\n"), ("file", "\n")):
        source = {"path": str(tmp_path / "raw" / "long.txt"), "documents": kind}
        content = f"short one{ends}{words}{ends}last"
        corpus = attempt("long.txt", content.encode(), source=source, **limit)
        characters = corpus.manifest["totals"]["characters"]
        assert len(words) <= characters <= len(content) and corpus.manifest["totals"]["documents"] >= 4
    lines = f'{{"text": "first text"}}\n{{"text": "{words}"}}\n{{"text": "third text"}}\n'
    corpus = attempt("c.jsonl", lines.encode(), source={"path": str(tmp_path / "raw" / "c.jsonl")}, **limit)
    reading = corpus.manifest["rules"]["reading"]
    assert [corpus.where(0, i).rpartition(":")[2] for i in range(2)] == ["1", "3"]
    assert reading["samples"][0]["where"].endswith("c.jsonl:2") and reading["dropped"] == 1 and reading["in"] == 3
    pq.write_table(pa.table({"text": ["first text", words]}), tmp_path / "long.parquet")
    corpus = attempt("x.txt", b"", source={"path": str(tmp_path / "long.parquet")}, **limit)
    assert corpus.manifest["rules"]["reading"]["samples"][0]["where"].endswith("long.parquet:row 2")


def test_the_longest_document_is_in_bytes_of_utf8(attempt, tmp_path):
    """Chinese takes three a character: in lines, in Parquet, escaped in JSON, beside other columns; in text, split."""
    texts = ["文" * 1000, "文" * 300 + "ab" * 62, "文" * 342]  # 3000, 1024 and 1026 bytes
    limit = {"max_document_bytes": 1024, "duplicates": "keep"}
    rows = [{"id": "x" * 2000, "text": text} for text in texts]
    for name, lines in (
        ("a.jsonl", "\n".join(json.dumps(row) for row in rows)),
        ("b.jsonl", "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)),
        ("c.csv", "id,text\n" + "\n".join(f"{row['id']},{row['text']}" for row in rows)),
    ):
        corpus = attempt(name, lines.encode(), source={"path": str(tmp_path / "raw" / name)}, **limit)
        assert corpus.manifest["totals"] == {"documents": 1, "tokens": corpus.shards[0].tokens, "characters": 424}
        assert corpus.manifest["rules"]["reading"]["reasons"] == {"longer than max_document_bytes": 2}
    for documents in ("line", "file", "blank_line"):
        source = {"path": str(tmp_path / "raw" / "d.txt"), "documents": documents}
        corpus = attempt("d.txt", "\n".join(texts).encode(), source=source, **limit)
        assert corpus.manifest["rules"]["reading"]["dropped"] == 0
        assert corpus.manifest["totals"]["documents"] >= 5
        letters = sum(map(len, texts))
        assert letters <= corpus.manifest["totals"]["characters"] <= letters + 2


def test_a_corpus_in_a_folder_that_is_read_is_none_of_its_files(attempt, tmp_path, tiny_llama):
    attempt("b.jsonl", b"")
    (tmp_path / "out").rename(tmp_path / "raw" / "old")
    assert not (tmp_path / "out.lock").exists()
    corpus = attempt("b.jsonl", b"")
    assert [entry["file"].rpartition("/")[2] for entry in corpus.manifest["sources"][0]["files"]] == [
        "a.jsonl",
        "b.jsonl",
    ]
    with pytest.raises(UserError, match="holds nothing but corpora"):
        other = tmp_path / "corpora" / "one"
        other.parent.mkdir()
        (tmp_path / "raw" / "old").rename(other)
        (other.parent / "manifest.json").write_text("[]")
        (other.parent / "shards").mkdir()
        corpora.made(tmp_path / "2", tiny_llama, str(other.parent))


def test_whole_files_that_are_too_long_are_refused(attempt, tmp_path):
    body = "word " * 20_000
    for name, content in (
        ("p.html", f"<p>{body}</p>"),
        ("p.json", json.dumps([{"text": body}])),
        ("p.xml", f"<doc>{body}</doc>"),
    ):
        told = attempt(name, content.encode(), source={"path": str(tmp_path / "raw" / name)}, max_document_bytes=1024)
        assert name in told and "max_document_bytes" in told


MEASURE = """
import resource, sys
from fastft.config.corpus import load_corpus
from fastft.corpus.build import prepare
from fastft.corpus.tokens import facts_of
config = load_corpus(sys.argv[1])
facts_of(config.tokenizer, None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print(prepare(config).manifest["totals"])
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize(
    "kind", ["zeros", "a", "jsonl", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("words", "csv"))]
)
def test_a_bomb_and_a_line_without_end_take_little_memory(tmp_path, tiny_llama, kind):
    """400 MB in one line, from under 2 MB of gzip: split or refused, in under 250 MB above what imports take."""
    part = {"zeros": b"\0" * 1000, "words": b"some words of it " * 60}.get(kind, b"a" * 1000)
    name = {"jsonl": "bomb.jsonl.gz", "csv": "bomb.csv.gz"}.get(kind, "bomb.txt.gz")
    start = {"jsonl": b'{"text": "a good text"}\n{"text": "', "csv": b'text\na good text\n"'}.get(kind, b"")
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as f:
        f.write(start)
        for _ in range(400):
            f.write(part * 1000)
    (tmp_path / "c.yaml").write_text(
        f"output: {tmp_path}/out\ntokenizer: {tiny_llama}\nsources: {tmp_path}/{name}\nworkers: 1\n"
        "max_document_bytes: 262144\n"
    )
    process = launch.start([sys.executable, "-c", MEASURE, str(tmp_path / "c.yaml")])
    output = launch.finish(process, 200)
    assert int(output.rpartition("peak ")[2].split()[0]) < 250_000, output
    if kind == "zeros":
        assert "holds zero bytes" in output
    elif kind == "csv":
        assert "bomb.csv.gz:3: a line is longer than 8 times max_document_bytes" in output, output
    else:
        assert ("'documents': 1," in output) == (kind == "jsonl") and "'documents'" in output, output
