"""`fastft import-tokens`: files as datatrove and Megatron-LM lay them out, whole and broken."""

import json
import struct

import corpora
import jobs
import numpy as np
import pytest
import transformers

from fastft.cli.main import main
from fastft.corpus import importing, tokenfiles
from fastft.corpus.importing import import_tokens
from fastft.corpus.lookup import find
from fastft.corpus.tokens import facts_of
from fastft.errors import UserError

TEXTS = [corpora.prose(n, 10 + n) for n in range(40)]


@pytest.fixture
def rows(tiny_llama):
    """Tokens of each text, the end of text behind them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    facts = facts_of(str(tiny_llama), None)
    return [[*facts.before, *tokenizer(t, add_special_tokens=False)["input_ids"], *facts.after] for t in TEXTS]


def ds(path, rows, name="models/tiny", dtype="<u2"):
    """As DocumentTokenizer writes it; see datatrove/pipeline/tokens/tokenizer.py (TokenizedFile)."""
    path.write_bytes(np.array([token for row in rows for token in row], dtype).tobytes())
    ends = np.cumsum([len(row) for row in rows]).tolist()
    path.with_name(path.name + ".index").write_bytes(struct.pack(f"<{len(ends)}Q", *ends))
    said = f"{name}|{np.dtype(dtype).itemsize}\n{ends[-1]}\n{ends[-1]} T"
    path.with_name(path.name + ".metadata").write_text(said)
    return path


def megatron(path, rows, code=8, cut=1, modes=b""):
    """As IndexedDatasetBuilder writes it; see megatron/core/datasets/indexed_dataset.py. cut: sequences a document."""
    dtype = np.dtype(tokenfiles.CODES[code])
    parts = [part for row in rows for part in np.array_split(np.array(row, dtype), cut)]
    path.write_bytes(b"".join(part.tobytes() for part in parts))
    sizes = [len(part) for part in parts]
    pointers = np.concatenate([[0], np.cumsum(sizes)[:-1]]) * dtype.itemsize
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(parts), len(rows) + 1)
    marks = np.arange(len(rows) + 1, dtype="<i8") * cut
    body = np.array(sizes, "<i4").tobytes() + pointers.astype("<i8").tobytes() + marks.tobytes()
    path.with_suffix(".idx").write_bytes(head + body + modes)
    return path


def imported(tmp_path, tiny_llama, *paths, **more):
    return import_tokens(tmp_path / "out", [str(p) for p in paths], str(tiny_llama), name="them", **more)


WRITERS = {
    "ds": lambda p, rows: ds(p / "a.ds", rows),
    "ds of 4 bytes": lambda p, rows: ds(p / "a.ds", rows, dtype="<u4"),
    "megatron": lambda p, rows: megatron(p / "a.bin", rows),
    "megatron int32, 2 sequences": lambda p, rows: megatron(p / "a.bin", rows, code=4, cut=2),
    "megatron with modes": lambda p, rows: megatron(p / "a.bin", rows, modes=bytes(len(rows))),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_tokens_are_those_of_the_file_and_of_prepare(tmp_path, tiny_llama, rows, kind, lm_config):
    path = WRITERS[kind](tmp_path, rows)
    corpus = imported(tmp_path, tiny_llama, path, licence="CC0")
    assert [corpus.tokens(0)[i].tolist() for i in range(len(rows))] == rows
    own = corpora.made(tmp_path / "own", tiny_llama, str(corpora.jsonl(tmp_path / "texts.jsonl", TEXTS)))
    assert np.array_equal(own.ids(0), corpus.ids(0)) and np.array_equal(own.characters(0), corpus.characters(0))
    said = corpus.manifest
    for name in ("dtype", "before", "after", "vocabulary", "tokenizer"):
        assert said["tokens"][name] == own.manifest["tokens"][name]
    assert said["totals"] == own.manifest["totals"] and said["sources"][0]["licence"] == "CC0"
    assert find(corpus, f"them:{path}:3") == [(0, 2)]
    assert imported(tmp_path, tiny_llama, path, licence="CC0").digest == corpus.digest
    batches = []
    for made in (corpus, own):
        lm_config["data"] |= {"train": str(made.folder), "eval": {}, "cache": str(made.folder.parent / "cache")}
        task = jobs.task_of(lm_config)
        batches.append(jobs.collate(task, task.train_split(), [0, 1, 2]).labels.tolist())
    assert batches[0] == batches[1]


def test_a_folder_of_both_kinds_and_the_verb(tmp_path, tiny_llama, rows, capfd):
    (tmp_path / "in").mkdir()
    ds(tmp_path / "in" / "a.ds", [*rows[:9], [], *rows[9:20]])
    megatron(tmp_path / "in" / "b.bin", rows[20:])
    with pytest.raises(SystemExit) as e:
        main(
            ["import-tokens", *map(str, [tmp_path / "out", tmp_path / "in"]), "--tokenizer", str(tiny_llama), "--json"]
        )
    assert not e.value.code
    found = json.loads(capfd.readouterr().out)
    assert found["totals"]["documents"] == 40 and found["rules"]["reading"]["reasons"] == {"no token": 1}
    assert found["sources"][0]["name"] == "in" and found["shards"] == 2
    with pytest.raises(UserError, match="is there already"):
        imported(tmp_path, tiny_llama, tmp_path / "in" / "b.bin")
    assert (
        imported(tmp_path, tiny_llama, tmp_path / "in" / "b.bin", overwrite=True).manifest["totals"]["documents"] == 20
    )


def test_without_the_end_of_text(tmp_path, tiny_llama, rows):
    after = len(facts_of(str(tiny_llama), None).after)
    assert after
    corpus = imported(tmp_path, tiny_llama, ds(tmp_path / "a.ds", [row[:-after] for row in rows[:30]]))
    said = corpus.manifest["tokens"]
    assert said["after"] == [] and said["end_with_special_tokens"] == 0
    assert said["because"].endswith("the text of 30 of 30 documents gives the same tokens")


def cut(path, size=-1):
    path.write_bytes(path.read_bytes()[:size])


def put(path, at, content):
    found = bytearray(path.read_bytes())
    found[at : at + len(content)] = content
    path.write_bytes(found)


BROKEN = {
    "ds cut short": ("a.ds", cut, r"a\.ds: is cut short or garbled"),
    "index cut short": ("a.ds.index", cut, r"a\.ds\.index: is cut short"),
    "index of fewer": ("a.ds.index", lambda p: cut(p, -8), r"a\.ds\.metadata: says 3,\d+ tokens"),
    "index garbled": ("a.ds.index", lambda p: put(p, 8, b"\xff" * 7), r"a\.ds\.index: is garbled"),
    "no index": ("a.ds.index", lambda p: p.unlink(), r"a\.ds: has no index"),
    "metadata": ("a.ds.metadata", lambda p: p.write_text("{}"), r"a\.ds\.metadata: is not datatrove's"),
    "loss": ("a.ds.loss", lambda p: p.write_bytes(b"\0"), r"a\.ds\.loss: leaves tokens out"),
    "outside": ("a.ds", lambda p: put(p, 100, b"\xff\xff"), r"a\.ds:\d+: token 65535 is outside"),
    "bin cut short": ("b.bin", cut, r"b\.bin: is cut short or garbled"),
    "idx cut short": ("b.idx", cut, r"b\.idx: is cut short or garbled"),
    "idx without a head": ("b.idx", lambda p: cut(p, 20), r"b\.idx: is no index of Megatron-LM"),
    "idx of a version": ("b.idx", lambda p: put(p, 9, b"\2"), r"b\.idx: version 2"),
    "idx of floats": ("b.idx", lambda p: put(p, 17, b"\6"), r"b\.idx: dtype 6, which is no integer"),
    "idx of another dtype": ("b.idx", lambda p: put(p, 17, b"\4"), r"b\.idx: is garbled"),
    "sizes": ("b.idx", lambda p: put(p, 34, b"\1"), r"b\.idx: is garbled"),
    "documents": ("b.idx", lambda p: put(p, len(p.read_bytes()) - 8, b"\1"), r"b\.idx: is garbled"),
    "legacy": ("b.idx", lambda p: put(p, 0, b"TNTIDX\0\0"), r"b\.idx: is of the older kind"),
    "no idx": ("b.idx", lambda p: p.unlink(), r"b\.bin: has no index"),
    "modes": ("b.idx", lambda p: p.write_bytes(p.read_bytes() + b"\0" * 39 + b"\1"), r"b\.idx: holds sequences that"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_what_is_broken_is_refused_by_name(tmp_path, tiny_llama, rows, fault):
    ds(tmp_path / "a.ds", rows)
    megatron(tmp_path / "b.bin", rows)
    name, breaks, said = BROKEN[fault]
    breaks(tmp_path / name)
    with pytest.raises(UserError, match=said):
        imported(tmp_path, tiny_llama, tmp_path / f"{name[0]}.{'ds' if name[0] == 'a' else 'bin'}")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".*fastft*"))


@pytest.fixture(scope="module")
def many(tiny_llama):
    """Tokens of 600 documents."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    return [[*tokenizer(corpora.prose(n, 20), add_special_tokens=False)["input_ids"], 0] for n in range(600)]


@pytest.mark.parametrize("kind", ["ds", "bin"])
def test_what_goes_wrong_far_behind_is_named_by_its_document(tmp_path, tiny_llama, many, kind):
    write, index, suffix = (ds, "a.ds.index", "ds") if kind == "ds" else (megatron, "a.idx", "bin")
    path = write(tmp_path / f"a.{suffix}", many)
    place = 2 * sum(len(row) for row in many[:450])
    put(path, place, b"\xff\xff")
    with pytest.raises(UserError, match=rf"a\.{suffix}:451: token 65535 is outside the tokenizer's vocabulary"):
        imported(tmp_path, tiny_llama, path)
    write(path, many)
    put(tmp_path / index, 8 * 450 if kind == "ds" else 34 + 4 * 450, b"\xff\xff\xff\x00")
    with pytest.raises(UserError, match=rf"{index}: is garbled: (document|sequence) 452 "):
        imported(tmp_path, tiny_llama, path)
    moved = [[(token + 7) % 200 + 3 for token in row] for row in many[250:]]
    with pytest.raises(UserError, match=r"of 200 documents, the text of \d+ gives .* is .*:25\d\."):
        imported(tmp_path, tiny_llama, write(path, [*many[:250], *moved]))
    with pytest.raises(UserError, match="no file of tokens is given"):
        imported(tmp_path, tiny_llama)


def test_another_tokenizer_is_found_out(tmp_path, tiny_llama, rows):
    moved = [[(token + 7) % 200 + 3 for token in row] for row in rows]
    with pytest.raises(UserError, match=r"is not of the tokenizer .* of 40 documents, the text of \d+ gives"):
        imported(tmp_path, tiny_llama, ds(tmp_path / "a.ds", moved))
    assert imported(tmp_path, tiny_llama, tmp_path / "a.ds", checked=False).manifest["totals"]["documents"] == 40
    with pytest.raises(UserError, match="is no file of tokens"):
        imported(tmp_path, tiny_llama, corpora.jsonl(tmp_path / "x.jsonl", TEXTS))
    with pytest.raises(UserError, match="is not there"):
        imported(tmp_path, tiny_llama, tmp_path / "none.ds")


def test_long_documents_are_looked_at_by_their_begin(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setattr(importing, "COMPARED", 150)
    text = " ".join(TEXTS)
    row = transformers.AutoTokenizer.from_pretrained(tiny_llama)(text, add_special_tokens=False)["input_ids"]
    assert len(row) > 1000
    made = imported(tmp_path, tiny_llama, ds(tmp_path / "a.ds", [row] * 3))
    assert "the text of 3 of 3 documents" in made.manifest["tokens"]["because"]
    with pytest.raises(UserError, match="of 3 documents, the text of 0 gives"):
        moved = [[(token + 7) % 200 + 3 for token in row]] * 3
        import_tokens(tmp_path / "other", [str(ds(tmp_path / "b.ds", moved))], str(tiny_llama), name="them")
