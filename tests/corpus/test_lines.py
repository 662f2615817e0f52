"""JSON lines as bytes: the same rows as from Python's own decoder, wherever they are cut and taken apart."""

import gzip
import io
import json
import random
from dataclasses import replace

import corpora
import pytest

from fastft.corpus import lines
from fastft.corpus.build import prepare
from fastft.corpus.files import files_of
from fastft.corpus.reading import Position, Reader
from fastft.errors import UserError

ODD = [
    '{"text": "plain"}',
    '{"text": "a \\"quoted\\" word", "id": 7}',
    '{"text": "ends in a backslash \\\\"}',
    '{"text": "once", "text": "twice"}',
    '{"text": "\\\\", "b": "\\\\", "c": "\\\\", "n": 1, "n": 2}',
    '{"te\\u0078t": "an escaped key", "text": "and the same"}',
    '{"text": "half \\ud800 a character"}',
    '{"text": "\\ud83d\\ude00 whole"}',
    '{"text": 123456789012345678901234567890}',
    '{"text": NaN}',
    '{"text": null}',
    '{"text": "  \\n "}',
    '{"text": "numbers beside", "n": [1, NaN, 2e999]}',
    '{"text": "nested", "meta": {"a": ["x", {"b": "\\"", "c": []}], "d": "text"}}',
    '{"text": "nested twice", "meta": {"a": "x", "a": "y"}}',
    '{"text": "control \\u0000 sign"}',
    '{"text": "raw\ttab"}',
    '{"other": "no column"}',
    '["text"]',
    '"text"',
    "{'text': 'single'}",
    "\u00a0",
    '{"text": "' + "x" * 300 + '"}',
    '{"text": "äöü \u2028 line separator"}',
]


def of(content: bytes) -> lines.Lines:
    return lines.Lines(content, 5, "f.jsonl:", 0, "text", 300)


@pytest.mark.parametrize("line", ODD)
def test_a_line_is_what_pythons_decoder_says(line, monkeypatch):
    whole = f'{{"text": "first"}}\n{line}\n{{"text": "last"}}\n'.encode()
    fast = of(whole).rows()
    assert lines.loads is not None, "orjson is a part of the extra data"
    monkeypatch.setattr(lines, "loads", None)
    plain = of(whole).rows()
    assert fast[:2] == plain[:2] and str(fast[2]) == str(plain[2])
    assert fast[0].places[0] == (0, 5) and (fast[2] is not None or fast[0].places[-1] == (0, 7))


def test_the_ends_of_lines():
    content = b'{"text": "a"}\r\n\r\n{"text": "b"}\r{"text": "c"}\n\n{"text": "d"}'
    assert of(content).rows()[0].places == [(0, 5), (0, 7), (0, 8), (0, 10)] and lines.lines_in(content) == 6
    found = of(b'{"text": "a"}\n{"text": "\xff"}\n').rows()
    assert found[0].texts == ["a"] and "f.jsonl:6: is not UTF-8" in str(found[2])


def test_cuts_do_not_depend_on_how_much_is_read_at_a_time(monkeypatch):
    rng = random.Random(0)
    content = b"".join(b"x" * rng.choice([0, 3, 40, 900]) + b"\n" for _ in range(200)) + b"the end"
    monkeypatch.setattr(lines, "SIZE", 256)
    found = []
    for most in (1, 100, 256, 5000):
        f = io.BytesIO(content)
        found.append(list(lines.cut(lambda size, f=f, most=most: f.read(min(size, most)))))
    assert found.count(found[0]) == 4 and b"".join(found[0]) == content and len(found[0]) > 20
    assert all(part.endswith(b"\n") for part in found[0][:-1])


@pytest.mark.parametrize("kind", ["plain", "gz", "bom", "too long"])
def test_blocks_from_anywhere(tmp_path, tiny_llama, monkeypatch, kind):
    """What a process that reads the file again has is what was read here; from any block on, the rest is the same."""
    monkeypatch.setattr(lines, "SIZE", 300)
    rows = [json.dumps({"text": f"row {i} " + "ä" * (i % 50)}, ensure_ascii=False) for i in range(120)]
    if kind == "too long":
        rows[60] = json.dumps({"text": "y" * 9000})
    content = "\n".join(rows).encode()
    path = tmp_path / ("r.jsonl.gz" if kind == "gz" else "r.jsonl")
    path.write_bytes(gzip.compress(content) if kind == "gz" else b"\xef\xbb\xbf" * (kind == "bom") + content)
    config = corpora.config_of(tmp_path, tiny_llama, str(path)).changed(max_document_bytes=1000)
    files = [files_of(source, config.max_document_bytes) for source in config.sources]

    def blocks(start: Position) -> list:
        found = []
        for block in Reader(config, files, [[]]).blocks(start):
            here, again = block.rows.rows(), getattr(block.rows, "here", lambda block=block: block.rows)().rows()
            assert here == again
            again_by_place = isinstance(getattr(block.rows, "here", lambda: None)(), lines.Placed)
            found.append((here, block.end, block.read, again_by_place))
        return found

    whole = blocks(Position())
    assert sum(len(block[0][0].texts) for block in whole) == 120 - (kind == "too long") and len(whole) > 20
    assert sum(block[3] for block in whole) == {"gz": 0, "too long": 0}.get(kind, len(whole) - 2)
    for at in (3, 11, len(whole) - 2):
        rest = blocks(whole[at][1])
        assert [block[:3] for block in rest] == [block[:3] for block in whole[at + 1 :]]
    path.write_bytes(b"{}")
    with pytest.raises(UserError, match=r"cannot be read as jsonl: it has become shorter"):
        lines.Placed(replace(of(b""), path=str(path)), 100).rows()


@pytest.mark.parametrize("size", [500, 1 << 20])
def test_behind_a_broken_line_a_file_is_left(tmp_path, tiny_llama, monkeypatch, size):
    """With any number of workers, though they are ahead of it by then; also in files that are worked on together."""
    monkeypatch.setattr(lines, "SIZE", size)
    (tmp_path / "raw").mkdir()
    for name in "abc":
        path = corpora.jsonl(tmp_path / "raw" / f"{name}.jsonl", [corpora.prose(i) + name for i in range(60)])
        if name == "b":
            content = path.read_text().splitlines()
            path.write_text("\n".join([*content[:20], '{"text": broken}', *content[20:], "{"]))
    found = []
    for workers in (1, 2, 3) if size == 500 else (1, 2):
        settings = {"workers": workers, "unreadable": "skip", "shard_tokens": 4000}
        corpus = corpora.made(tmp_path / str(workers), tiny_llama, str(tmp_path / "raw"), **settings)
        found.append(corpora.content(corpus.folder))
    assert found.count(found[0]) == len(found) and len(corpus.shards) > (2 if size == 500 else 0)
    assert corpus.manifest["totals"]["documents"] == 140 and corpus.manifest["rules"]["reading"]["in"] == 140
    said = json.dumps(corpus.manifest["sources"])
    assert said.count("broken JSON") == 1 and "b.jsonl:21: broken JSON" in said
    config = corpora.config_of(tmp_path, tiny_llama, str(tmp_path / "raw")).changed(workers=2)
    with pytest.raises(UserError, match=r"b\.jsonl:21: broken JSON.*\n.*unreadable: skip"):
        prepare(config)


def test_small_files_are_worked_on_together(tmp_path, tiny_llama):
    raw = tmp_path / "raw"
    raw.mkdir()
    for i in range(30):
        corpora.jsonl(raw / f"{i:02d}.jsonl", [f"text {i} {row}" for row in range(3)])
    (raw / "30.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "behind a mark"}')
    (raw / "31.jsonl").write_bytes(b"\n \n")
    (raw / "32.jsonl").write_bytes(b"")
    config = corpora.config_of(tmp_path, tiny_llama, str(raw))
    files = [files_of(source, config.max_document_bytes) for source in config.sources]
    names = [[]]
    (block,) = Reader(config, files, names).blocks(Position())
    rows = block.rows.rows()[0]
    assert rows.texts == [f"text {i} {row}" for i in range(30) for row in range(3)] + ["behind a mark"]
    assert rows.where(4) == f"{raw}/01.jsonl:2" and len(names[0]) == 31 and block.read.rows == 91
    assert [name.rpartition("/")[2] for name in block.empty] == ["31.jsonl", "32.jsonl"]
    (raw / "15.jsonl").write_text('{"txt": "no such column"}')
    with pytest.raises(UserError, match=r"15\.jsonl:1: no column 'text'.*\n.*txt"):
        list(Reader(config, files, [[]]).blocks(Position()))


@pytest.mark.parametrize("size", [2000, 1 << 20])
def test_long_lines_are_counted_once_and_where_they_are(tmp_path, tiny_llama, monkeypatch, size):
    """Before a fault, behind it, last and without an end; whoever reads the sample has read them before."""
    monkeypatch.setattr(lines, "SIZE", size)
    rows = [json.dumps({"text": f"row {i} of many"}) for i in range(200)]
    for i in (3, 100, 150, 199):
        rows[i] = json.dumps({"text": "y" * 9000})
    path = tmp_path / "r.jsonl"
    for broken, counted in ((None, [200, 196, 4]), (120, [120, 118, 2])):
        if broken is not None:
            rows[broken] = "{"
        path.write_text("\n".join(rows))
        for workers in (1, 2):
            settings = {"workers": workers, "unreadable": "skip", "max_document_bytes": 1024, "shard_tokens": 300}
            corpus = corpora.made(tmp_path / f"{broken}{workers}", tiny_llama, str(path), **settings)
            said = corpus.manifest["rules"]["reading"]
            assert [said[name] for name in ("in", "kept", "dropped")] == counted, (broken, workers)
            assert [sample["where"].rpartition(":")[2] for sample in said["samples"]] == ["4", "101", "151"][
                : counted[2]
            ]


def test_deep_nesting_is_told_wherever_it_is_read(monkeypatch):
    for depth in (400, 499, 500, 501, 700, 990, 3000):
        line = b'{"text": "x y", "n": ' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
        found = of(line).rows()
        assert len(found[0].texts) == (depth <= 500), depth
        assert depth <= 500 or "nested" in str(found[2])


def test_the_sample_looks_past_what_has_no_text(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(lines, "SIZE", 300)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.jsonl").write_text("\n" * 3000)
    corpora.jsonl(tmp_path / "raw" / "b.jsonl", [corpora.prose(i) for i in range(50)])
    corpus = corpora.made(tmp_path, tiny_llama, str(tmp_path / "raw"))
    assert "on 50 of 50 documents" in corpus.manifest["tokens"]["because"]
