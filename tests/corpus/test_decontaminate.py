"""The rule `decontaminate`: planted texts of evaluation sets are found, nothing else is.

``benchmarks/decontamination.py`` is the same on real texts, and writes the table.
"""

import json
import random
import re
import sys

import corpora
import pytest
import transformers
from test_duplicates import made_up

import launch
from fastft import rooms
from fastft.corpus.build import prepare
from fastft.corpus.ngrams import plain_words, word_places
from fastft.corpus.rules.base import Document
from fastft.errors import UserError

sys.path.insert(0, str(launch.ROOT / "benchmarks"))
import decontamination


def rule(**settings):
    kind = rooms.RULES.get("decontaminate")
    return kind(kind.Settings(**settings))


def applied(one, *texts: str) -> list[str | None]:
    documents = list(map(Document, texts))
    one.look(documents)
    return [one.apply(document) for document in documents]


def test_planted_texts_are_found_and_nothing_else(tmp_path, tiny_llama):
    rng = random.Random(0)
    texts = [made_up(rng, rng.randint(3, 70)) for _ in range(200)]
    (tmp_path / "eval").mkdir()
    corpora.jsonl(tmp_path / "eval" / "a.jsonl", texts[:100])
    rows = [{"question": a, "choices": ["yes", "no", b]} for a, b in zip(texts[100:150], texts[150:], strict=True)]
    (tmp_path / "eval" / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents, kinds = decontamination.planted([made_up(rng, 80) for _ in range(1000)], texts, rng)
    sets = [str(tmp_path / "eval" / "a.jsonl"), {"path": str(tmp_path / "eval" / "b.jsonl"), "name": "qa"}]
    result = decontamination.found(tmp_path, tiny_llama, documents, {"sets": sets}, texts, workers=1)
    assert result["wrong"] == [] and len(kinds) == 200
    for name in decontamination.KINDS:
        of = [number in result["left_out"] for number, kind in kinds.items() if kind == name]
        assert len(of) == 50 and sum(of) / len(of) >= (0.9 if "replaced" in name else 1)
    told = result["rule"]
    assert sum(told["reasons"].values()) == len(result["left_out"]) and set(told["reasons"]) == {
        "text of a",
        "text of qa",
    }
    assert {one["of"].rpartition("/")[2].partition(":")[0] for one in told["samples"]} == {"a.jsonl", "b.jsonl"}
    short = sum(len(text.split()) < 8 for text in texts[:100])
    assert told["sets"]["a"]["texts"] == 100 and told["sets"]["a"]["too_short"] == short > 0
    assert told["sets"]["qa"]["texts"] == 200 and [file["file"] for file in told["files"]] == [sets[0], sets[1]["path"]]


TEXT = "One two three four five six seven eight nine ten, eleven twelve thirteen: fourteen fifteen sixteen."


@pytest.mark.parametrize(
    "settings, text, out",
    [
        ({}, "so ONE two, three four five six seven eight\n nine ten eleven twelve thirteen!", True),
        ({}, "one two three four five six seven eight nine ten eleven twelve", False),
        ({"ngram": 12}, "one two three four five six seven eight nine ten eleven twelve", True),
        ({"ngram": 4, "shortest": 4, "share": 0.6}, "x three four five six seven eight nine ten y", False),  # 5 of 13
        ({"ngram": 4, "shortest": 4, "share": 0.6}, TEXT[4:].partition(" thirteen")[0], True),
        ({}, "and red orange yellow green blue indigo violet black and", True),  # 8 words, looked for whole
        ({}, "red orange yellow green blue indigo violet white", False),
        ({}, "a cat sat", False),  # 3 words: not looked for
        ({"ngram": 3, "shortest": 3}, "a cat sat", True),
        ({}, "", False),
        ({}, "他们在学习中文语法和汉字的写法之后", True),  # 13 characters
    ],
)
def test_what_is_held(tmp_path, settings, text, out):
    colours = "Red, orange, yellow, green, blue, indigo, violet, black"
    texts = [TEXT, colours, "A cat sat", "", "在学习中文语法和汉字的写法之"]
    path = corpora.jsonl(tmp_path / "e.jsonl", texts)
    one = rule(sets=[{"path": str(path), "name": "e", "texts": "text"}], **settings)
    assert applied(one, "nothing of it at all", text) == [None, "text of e" if out else None]


def cut(tmp_path, text: str, **settings) -> tuple[str | None, str]:
    path = corpora.jsonl(tmp_path / "e.jsonl", [TEXT, "他们在学习中文语法和汉字的写法"])
    one = rule(sets=[{"path": str(path), "name": "e"}], cut=settings)
    document = Document(text)
    one.look([document])
    return one.apply(document), document.text


def test_what_both_have_is_cut_out(tmp_path):
    """With a window to the next space; parts that are too short go, too, and what is put side by side is looked at."""
    before, after = "alpha beta gamma delta.", "Epsilon zeta, eta theta!"
    whole = f"{before} {TEXT[:-1]} {after}"
    assert cut(tmp_path, whole, window=0, shortest=5) == (None, f"{before}\n\n{after}")
    assert cut(tmp_path, whole, window=8, shortest=5) == (None, "alpha beta gamma\n\nzeta, eta theta!")
    assert cut(tmp_path, whole, window=0, shortest=24) == (None, after)
    assert cut(tmp_path, whole, window=0, shortest=30) == ("text of e", whole)
    assert cut(tmp_path, TEXT, window=0, shortest=1) == ("text of e", TEXT)
    assert cut(tmp_path, before, window=0, shortest=1) == (None, before)
    twice = f"{before} {TEXT} {after} {TEXT} {before}"
    assert cut(tmp_path, twice, window=0, shortest=5) == (None, f"{before}\n\n{after}\n\n{before}")
    half, rest = TEXT.split("eight ")  # neither is found; together they are what was looked for
    nested = f"{half}{TEXT[:-1]} eight {rest}"
    assert cut(tmp_path, nested, window=0, shortest=1)[0] == "text of e"
    chinese = "".join(chr(0x4E00 + n) for n in range(40))
    assert cut(tmp_path, f"{chinese}他们在学习中文语法和汉字的写法{chinese}", window=0, shortest=40) == (
        None,
        f"{chinese}\n\n{chinese}",
    )


def test_what_was_cut_out_is_counted_and_shown(tmp_path, tiny_llama):
    texts = [corpora.prose(n, 200) for n in range(12)]
    leaks = [f"{text} {TEXT} {text}" for text in texts[:5]]
    source = str(corpora.jsonl(tmp_path / "t.jsonl", [*leaks, *texts[5:]]))
    path = corpora.jsonl(tmp_path / "e.jsonl", [TEXT])
    rules = {"decontaminate": {"sets": [str(path)], "cut": True}}
    found = []
    for workers in (1, 2):
        corpus = corpora.made(tmp_path / str(workers), tiny_llama, source, rules=rules, workers=workers)
        found.append(corpora.content(corpus.folder))
    assert found[0] == found[1]
    told = corpus.manifest["rules"]["decontaminate"]
    assert (told["changed"], told["dropped"], told["found"]) == (5, 0, {"cut out: text of e": 5})
    assert [one["where"][-2:] for one in told["samples"]] == [":1", ":2", ":3"]
    assert all(TEXT[:60] in one["text"] and one["of"] == f"{path}:1" for one in told["samples"])
    left = corpora.texts_of(corpus, transformers.AutoTokenizer.from_pretrained(tiny_llama))
    assert len(left) == 12 and not any("eleven twelve" in text for text in left)
    assert sum("\n\n" in text for text in left) == 5


def test_places_are_those_of_the_words():
    rng = random.Random(0)
    for size in (*(rng.randint(0, 80) for _ in range(100)), 150_000):
        text = "".join(rng.choices("abc AB1\n\t.,中文かaé\u0301 \U00020000\u0e01x ", k=size))
        hashes, _ = plain_words([text])
        begin, end = word_places(text)
        assert len(begin) == len(end) == len(hashes)
        for i in rng.sample(range(len(begin)), min(5, len(begin))):
            assert plain_words([text[begin[i] : end[i]]])[0].tolist() == [hashes[i]]


def test_a_changed_set_is_another_corpus(tmp_path, tiny_llama):
    source = str(corpora.jsonl(tmp_path / "t.jsonl", [corpora.prose(n) for n in range(20)]))
    path = corpora.jsonl(tmp_path / "e.jsonl", [corpora.prose(3)])
    config = corpora.config_of(tmp_path, tiny_llama, source, rules={"decontaminate": [str(path)]}, workers=2)
    corpus = prepare(config)
    rule = corpus.manifest["rules"]["decontaminate"]
    assert rule["reasons"] == {"text of e": rule["dropped"]} and 1 <= rule["dropped"] < 20
    assert prepare(config).digest == corpus.digest
    corpora.jsonl(path, [corpora.prose(4)])
    with pytest.raises(UserError, match="made from other files or settings"):
        prepare(config)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"sets": "nowhere.jsonl"}, "nowhere.jsonl: no such file"),
        ({"sets": {"path": "e.jsonl", "texts": ["titel"]}}, "e.jsonl:1: no column 'titel'"),
        ({"sets": "empty.txt"}, "rules.decontaminate: empty.txt: holds no text"),
        ({"sets": "e.jsonl", "ngram": 5}, "shortest: 8 is above ngram: 5"),
        ({"sets": []}, "rules.decontaminate.sets"),
    ],
)
def test_mistakes(tmp_path, tiny_llama, monkeypatch, settings, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    corpora.jsonl(tmp_path / "e.jsonl", ["a text"])
    with pytest.raises(UserError, match=re.escape(said)):
        corpora.made(tmp_path, tiny_llama, str(tmp_path / "e.jsonl"), rules={"decontaminate": settings})
