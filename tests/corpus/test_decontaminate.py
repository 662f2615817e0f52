"""The rule `decontaminate`: planted texts of evaluation sets are found, nothing else is.

``benchmarks/decontamination.py`` is the same on real texts, and writes the table.
"""

import json
import random
import re
import sys

import corpora
import pytest
from test_duplicates import made_up

import launch
from fastft import rooms
from fastft.corpus.build import prepare
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
