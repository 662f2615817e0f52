"""Rows are encoded in several processes, and by gigatoken: the columns are the same to the byte."""

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from fastft import rooms
from fastft.config.loading import validate
from fastft.corpus import tokens
from fastft.data import encoding
from fastft.data.encoder import Counts
from fastft.errors import UserError
from fastft.processes import Piped
from fastft.tasks import _ids

COUNT = 60  # rows; handed on ten at a time


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(encoding, "ROWS", 10)
    monkeypatch.setattr(_ids, "LEAST", 50)


def rows(path, change=lambda i, row: row):
    rng = random.Random(3)
    words = ["the", "patient", "was", "given", "a", "dose", "of", "20", "mg", "and", "is", "better", "now"]
    with open(path, "w") as f:
        for i in range(COUNT):
            text = " ".join(rng.choices(words, k=rng.randint(1, 40)))
            row = {"text": text, "label": rng.choice("abc"), "source": text, "target": text[::2], "value": i}
            row |= {"prompt": text, "completion": text[:5], "words": text.split(), "tags": ["O"] * len(text.split())}
            f.write(json.dumps(change(i, row)) + "\n")
    return path


def encoder_of(task, model, path, tmp_path, **data):
    raw = {
        "task": task,
        "model": {"path": str(model)},
        "data": {"train": str(path), "max_length": 24, "truncation": "truncate", **data},
        "optim": {"lr": 1e-3},
        "train": {"steps": 1},
        "run": {"dir": str(tmp_path / "run"), "device": "cpu", "offline": True},
    }
    config = validate(raw)
    return rooms.TASKS.get(task)(config).encoder(None), config.data.train


def made(folder, encoder, sources, workers):
    folder.mkdir()
    meta = encoding.encode(folder, encoder, sources, None, workers=workers)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}, meta


@pytest.mark.parametrize(
    ("task", "model", "data"),
    [
        ("causal_lm", "tiny_llama", {"truncation": "split"}),
        ("masked_lm", "tiny_masked", {}),
        ("classification", "tiny_bert", {}),
        ("regression", "tiny_bert", {"target": "value"}),
        ("token_classification", "tiny_bert", {"tokens": "words"}),
        ("sft", "tiny_llama", {"plain": True}),
    ],
)
def test_any_number_of_processes_gives_the_same(task, model, data, request, tmp_path):
    found = []
    for workers in (1, 2, 3):
        path = rows(tmp_path / "rows.jsonl")
        encoder, sources = encoder_of(task, request.getfixturevalue(model), path, tmp_path, **data)
        found.append(made(tmp_path / str(workers), encoder, sources, workers))
    assert found[0] == found[1] == found[2]
    counts = found[0][1]["counts"]
    assert counts["rows"] == COUNT and counts["truncated"] + counts["split"] > 5 and len(counts["overlong"]) == 3


def test_long_rows_are_sent_in_small_pieces(tiny_llama, tmp_path, monkeypatch):
    """Of a parquet file, whose rows lie in batches: a piece has its rows alone."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    texts = [json.loads(line)["text"] for line in rows(tmp_path / "rows.jsonl").read_text().splitlines()]
    pq.write_table(pa.table({"text": texts, "other": [b"x" * 100] * COUNT}), tmp_path / "rows.parquet")
    sent = []
    send = Piped.send
    monkeypatch.setattr(Piped, "send", lambda self, work: (sent.append(work), send(self, work)))
    monkeypatch.setattr(encoding, "SENT", 600)
    found = []
    for workers in (1, 2):
        encoder, sources = encoder_of("causal_lm", tiny_llama, tmp_path / "rows.parquet", tmp_path, truncation="split")
        found.append(made(tmp_path / str(workers), encoder, sources, workers))
    assert found[0] == found[1] and sum(map(len, sent)) == COUNT - encoding.ROWS
    assert len(sent[0]) == encoding.ROWS and {len(piece) for piece in sent[1:-1]} <= {1, 2, 3}
    assert max(len(pickle.dumps(piece)) for piece in sent[1:]) < 2000


def test_pairs_in_several_processes(pair_models, tmp_path):
    path = rows(tmp_path / "rows.jsonl")
    found = []
    for workers in (1, 2):
        encoder, sources = encoder_of("seq2seq", pair_models("t5"), path, tmp_path)
        found.append(made(tmp_path / str(workers), encoder, sources, workers))
    assert found[0] == found[1]


def test_rows_that_cannot_be_used_are_counted_alike(tiny_bert, tmp_path):
    path = rows(tmp_path / "rows.jsonl", lambda i, row: row | ({"label": ""} if i % 9 == 8 else {}))
    said = []
    for workers in (1, 2):
        encoder, sources = encoder_of("classification", tiny_bert, path, tmp_path)
        with pytest.raises(UserError) as e:
            made(tmp_path / str(workers), encoder, sources, workers)
        said.append(e.value.message)
    assert said[0] == said[1] and "rows.jsonl:9: the label is empty (5 more rows cannot be used)" in said[0]


@pytest.mark.parametrize("end", ["label", "broken"])
def test_the_first_row_is_told_whatever_is_found_first(end, tiny_bert, tmp_path):
    """Of a row that the encoder refuses, one that is refused as it is read, and a file that cannot be read on."""

    def change(i, row):
        return row | ({"label": ""} if i == 25 else {"text": 7} if i == 45 else {})

    path = rows(tmp_path / "rows.jsonl", change)
    if end == "broken":
        path.write_text("\n".join([*path.read_text().splitlines()[:50], "{"]))
    said = []
    for workers in (1, 3):
        encoder, sources = encoder_of("classification", tiny_bert, path, tmp_path)
        with pytest.raises(UserError) as e:
            made(tmp_path / str(workers), encoder, sources, workers)
        said.append(e.value.message)
    assert said[0] == said[1] and "rows.jsonl:26: the label is empty (1 more rows cannot be used)" in said[0]


def test_only_columns_that_are_looked_at_are_sent(tiny_llama, tmp_path, monkeypatch):
    """And a column that only later rows are asked for is there all the same."""
    path = rows(tmp_path / "rows.jsonl", lambda i, row: {"i": i, **row})
    sent, found, send = [], [], Piped.send
    monkeypatch.setattr(Piped, "send", lambda self, work: (sent.append(work), send(self, work)))
    for workers in (1, 2):
        encoder, sources = encoder_of("causal_lm", tiny_llama, path, tmp_path, truncation="split")
        plain = encoder.encode

        def encode(rows, counts, plain=plain):
            texts = [(w, {"text": r["text"] if r["i"] < 30 else r["source"][::-1]}) for w, r in rows]
            return plain(texts, counts)

        encoder.encode = encode
        found.append(made(tmp_path / str(workers), encoder, sources, workers))
    assert found[0] == found[1] and len(sent) == 5
    columns = {frozenset(record.values_of) for piece in sent for _, _, record in piece}
    assert columns <= {frozenset({"i", "text"}), frozenset({"i", "text", "source"})}


def test_sigchld_may_be_ignored(tiny_llama, tmp_path):
    encoder, sources = encoder_of("causal_lm", tiny_llama, rows(tmp_path / "rows.jsonl"), tmp_path, truncation="split")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert made(tmp_path / "out", encoder, sources, 2)[1]["counts"]["rows"] == COUNT
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_killed_process_is_told(tiny_llama, tmp_path, monkeypatch):
    encoder, sources = encoder_of("causal_lm", tiny_llama, rows(tmp_path / "rows.jsonl"), tmp_path, truncation="split")
    plain, here = encoder.ids, os.getpid()

    def killed(texts):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(texts)

    encoder.ids = killed
    with pytest.raises(UserError, match="was killed by SIGKILL") as e:
        made(tmp_path / "out", encoder, sources, 2)
    assert "data.workers: 1" in e.value.hint


def test_processes_end_with_their_parent(tmp_path):
    """Killed while its copies work, and wait."""
    script = textwrap.dedent(
        """
        import os, sys, time
        from fastft.processes import Copies, in_order

        def work(piece):
            open(os.path.join(sys.argv[1], str(os.getpid())), "w").close()
            time.sleep(600 if piece == 3 else 0)

        for piece, _ in in_order(range(8), Copies(work, 3, ""), int):
            pass
        """
    )
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], cwd=os.getcwd())
    deadline = time.monotonic() + 60
    while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    copies = [int(path.name) for path in tmp_path.iterdir()]
    assert len(copies) == 3
    while time.monotonic() < deadline and any(map(_alive, copies)):
        time.sleep(0.05)
    assert not any(map(_alive, copies))


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_gigatoken_gives_the_tokenizers_columns(tiny_llama, tmp_path, monkeypatch):
    pytest.importorskip("gigatoken")
    path, found = rows(tmp_path / "rows.jsonl"), []
    for name in ("fast", "plain"):
        encoder, sources = encoder_of("causal_lm", tiny_llama, path, tmp_path, truncation="split")
        if name == "plain":
            encoder.again()
        found.append(made(tmp_path / name, encoder, sources, 2))
        assert (encoder.ids.encoder is not None) == (name == "fast")
    assert found[0] == found[1]


def test_other_ids_begin_anew(tiny_llama, tmp_path, monkeypatch, caplog):
    """Where gigatoken gives other ids on a later row than those that it was tried on, all rows are tokenized again."""
    pytest.importorskip("gigatoken")
    path = rows(tmp_path / "rows.jsonl", lambda i, row: row | ({"text": "zz"} if i == 45 else {}))
    encoder, sources = encoder_of("causal_lm", tiny_llama, path, tmp_path, truncation="split")
    encoder.again()
    right, _ = made(tmp_path / "right", encoder, sources, 1)

    class Wrong(tokens._Gigatoken):
        def encode(self, texts, plain):
            values, lengths = super().encode(texts, plain)
            return (values + 1 if "zz" in texts else values), lengths

    monkeypatch.setattr(tokens, "_Gigatoken", Wrong)
    config = validate(
        {
            "task": "causal_lm",
            "model": {"path": str(tiny_llama)},
            "data": {"train": str(path), "max_length": 24, "truncation": "split", "workers": 2},
            "optim": {"lr": 1e-3},
            "train": {"steps": 1},
            "run": {"dir": str(tmp_path / "run"), "device": "cpu", "offline": True},
        }
    )
    split = rooms.TASKS.get("causal_lm")(config).train_split()
    assert "gigatoken gives other ids for 'zz': all rows are encoded anew" in caplog.text
    folder = split.data.folder
    assert {name: (folder / name).read_bytes() for name in right} == right


def test_counts_are_merged():
    one, two = Counts(rows=3, longest=5), Counts(rows=2, truncated=1)
    for i in range(2):
        one.too_long(f"a:{i}", 9)
        two.too_long(f"b:{i}", 11)
    two.add("words_dropped", 4)
    one.merge(two)
    assert one.overlong == ["a:0 (9 tokens)", "a:1 (9 tokens)", "b:0 (11 tokens)"]
    assert (one.rows, one.truncated, one.overlong_total, one.longest) == (5, 1, 4, 11)
    assert one.as_dict()["words_dropped"] == 4
