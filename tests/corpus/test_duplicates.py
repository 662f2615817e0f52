"""Near-duplicates: planted ones are found, nothing else is; the words and n-grams that they are told by.

``benchmarks/duplicates.py`` is the same on real texts, and writes the table.
"""

import json
import random
import re
import sys

import corpora
import numpy as np
import pytest

import launch
from fastft.config.corpus import NearDuplicates
from fastft.corpus import minhash, near, ngrams
from fastft.corpus.seen import Sorted
from fastft.errors import UserError

sys.path.insert(0, str(launch.ROOT / "benchmarks"))
import duplicates


def made_up(rng: random.Random, words: int) -> str:
    """Sentences of random words: no two are alike."""
    found = [f"{rng.choice('bcdfgklmnprst')}{rng.choice('aeiou')}{rng.randrange(3000)}" for _ in range(words)]
    return " ".join(word + "." * (i % 9 == 8) for i, word in enumerate(found))


def test_planted_ones_are_found_and_nothing_else(tmp_path, tiny_llama):
    """Five kinds of changes; some documents have a part in common, and some are longer than a sketch."""
    rng = random.Random(0)
    shared = made_up(rng, 60)
    texts = [made_up(rng, rng.randint(45, 300)) for _ in range(500)]
    texts += [f"{shared} {made_up(rng, 60)}" for _ in range(60)]  # similarity 0.33
    texts += [made_up(rng, 1500) for _ in range(10)]
    copies = duplicates.planted(texts, rng)
    result = duplicates.found(tmp_path, tiny_llama, texts, copies, {}, workers=1)
    assert {kind for kind, *_ in result["pairs"]} == set(duplicates.KINDS)
    alike, rest = [[out for _, j, out in result["pairs"] if low <= j < high] for low, high in ((0.85, 1.1), (0, 0.78))]
    assert len(alike) > 300 and np.mean(alike) >= 0.99 and len(rest) > 50 and not any(rest)
    assert result["precision"] == 1
    rule = result["rule"]
    assert rule["reasons"]["nearly the same text"] == rule["pairs"] > 300 and rule["compared"] < 3 * len(texts)
    sample = next(one for one in rule["samples"] if "of" in one)
    row, of = (int(sample[name].rpartition(":")[2]) - 1 for name in ("where", "of"))
    assert copies[row][0] == of and "planted" in sample["where"] and "whole" in sample["of"]
    assert float(sample["jaccard"]) == pytest.approx(
        duplicates.jaccard(duplicates.grams(copies[row][2]), duplicates.grams(texts[of])), abs=6e-4
    )


def test_the_first_stays_and_what_is_like_one_that_went_may_stay(tmp_path, tiny_llama, monkeypatch):
    """b is like a, c like b and not like a; an exact copy of what went goes, too. Chinese is compared by characters."""
    rng = random.Random(1)
    words = made_up(rng, 100).split()
    a, b, c = (" ".join([*(f"x{i}" for i in range(n)), *words[n:]]) for n in (0, 7, 14))
    sign = [chr(0x4E00 + rng.randrange(5000)) for _ in range(120)]
    chinese = ["".join(sign), "".join([*sign[:60], "。", *sign[60:115]]), "".join(reversed(sign))]
    source = str(
        corpora.jsonl(tmp_path / "t.jsonl", [a, b, c, b, *chinese, "Ah! Yes", "ah,   yes...", "ah, no", "!", "?"])
    )
    for rows in (1000, 2):  # in one block, and in several
        corpora.small_blocks(monkeypatch, rows)
        corpus = corpora.made(tmp_path / str(rows), tiny_llama, source, duplicates="near")
        rows_left = np.load(corpus.path(0) / "places.npy")[:, 1].tolist()
        assert rows_left == [1, 3, 5, 7, 8, 10, 11, 12]


def test_words_are_told_apart_as_said():
    """Beside Python's own: runs of letters and digits in lower case; long texts, cut into pieces, have the same."""
    texts = ["Naïve “CAFÉ”, it's 3.5 über-x", "", "...", "中文 is好 ภา", "İ ß", "a" * 70_000 + " b c " * 20_000]
    plain = [
        ["naïve", "café", "it", "s", "3", "5", "über", "x"],
        [],
        [],
        ["中", "文", "is", "好", "ภ", "า"],
        ["i", "ß"],
    ]
    hashes, counts = ngrams.plain_words(texts)
    assert counts[:5].tolist() == list(map(len, plain)) and 40_001 <= counts[5] <= 40_002
    known: dict[str, int] = {}
    for word, value in zip((w for row in plain for w in row), hashes.tolist(), strict=False):
        assert known.setdefault(word, value) == value
    assert len(set(known.values())) == len(known)
    again, _ = ngrams.plain_words(["b", "über", "中"])
    assert again.tolist() == [hashes[-2], known["über"], known["中"]]
    longest = "word " * 50_000
    assert len(set(ngrams.plain_words([longest])[0].tolist())) == 1


def test_runs_are_of_one_text_alone():
    texts = ["a b c d", "a b", "", "b c d", "x"]
    runs, counts = ngrams.runs_of_words(*ngrams.plain_words(texts), 3)
    assert counts.tolist() == [2, 1, 0, 1, 1]
    assert runs[1] == runs[3] and len(set(runs.tolist())) == 4  # "b c d"; a text with fewer words is one run


@pytest.mark.parametrize(
    "settings, shape",
    [
        ({}, (16, 6)),
        ({"threshold": 0.5}, (17, 2)),
        ({"threshold": 1.0}, (1, 6)),
        ({"bands": 9}, (9, 4)),
        ({"rows": 3}, (7, 3)),
    ],
)
def test_bands_by_the_threshold(settings, shape):
    assert minhash.shape_of(NearDuplicates(**settings)) == shape


def test_signatures_meet_as_often_as_they_should():
    """Of pairs at a known similarity; 400 documents of 200 runs of one word."""
    rng = random.Random(2)
    kind = minhash.MinHash(NearDuplicates(ngram=1, bands=20, rows=4))
    for similarity in (0.5, 0.8):
        share = round(200 * 2 * similarity / (1 + similarity))
        pairs = []
        for _ in range(400):
            words = [f"{rng.randrange(10**9)}" for _ in range(400 - share)]
            pairs += [" ".join(words[:200]), " ".join(words[200 - share : 400 - share])]
        bands = kind.of(pairs).bands.reshape(400, 2, 20)
        assert (bands[:, 0] == bands[:, 1]).mean() == pytest.approx(similarity**4, abs=0.015)


def test_sketches_of_long_documents_estimate(monkeypatch):
    rng = random.Random(3)
    kind = minhash.MinHash(NearDuplicates(ngram=1))
    words = [f"{rng.randrange(10**9)}" for _ in range(6000)]
    found = kind.of([" ".join(words[:5000]), " ".join(words[500:5500]), " ".join(words[:900])])
    one, other, short = np.split(found.grams, np.cumsum(found.counts)[:-1])
    assert found.counts.tolist() == [minhash.SKETCH, minhash.SKETCH, 900]
    assert minhash.jaccard(one, other) == pytest.approx(4500 / 5500, abs=0.04)
    assert minhash.jaccard(one, short) == pytest.approx(900 / 5000, abs=0.04) and minhash.jaccard(one, one) == 1


def test_the_index_is_the_same_however_it_came_about(tmp_path):
    """Documents one block at a time, or restored from the files: the same are found. A file that is short is told."""
    settings = NearDuplicates(threshold=0.5)
    kind, rng = minhash.MinHash(settings), random.Random(4)
    base = [made_up(rng, 80) for _ in range(40)]
    texts = [" ".join(rng.choice(base).split()[: rng.randint(40, 80)]) for _ in range(600)]
    whole = near.Near(settings, tmp_path / "whole")
    fresh = np.ones(50, bool)
    states, answers = [], []
    for at in range(0, 600, 50):
        states.append(whole.state())
        sketches = kind.of(texts[at : at + 50])
        found = whole.find(sketches, fresh)
        answers.append(found)
        whole.add(sketches.only(np.array([pair is None for pair in found])))
    assert 40 <= whole.documents < 200 and whole.pairs == 600 - whole.documents
    again = near.Near(settings, tmp_path / "whole")
    again.restore(states[6])
    assert again.documents < whole.documents
    for part, at in enumerate(range(300, 600, 50), start=6):
        sketches = kind.of(texts[at : at + 50])
        found = again.find(sketches, fresh)
        assert found == answers[part]
        again.add(sketches.only(np.array([pair is None for pair in found])))
    assert again.state() == whole.state()
    again.close()
    with open(tmp_path / "whole" / "grams.bin", "r+b") as f:
        f.truncate(100)
    with pytest.raises(UserError, match=r"grams.bin: is cut short"):
        near.Near(settings, tmp_path / "whole").restore(whole.state())


def test_sorted_parts_stay_few():
    index, rng = Sorted(), np.random.default_rng(0)
    values = rng.integers(0, 1 << 60, (200, 50), np.uint64)
    for part in values:
        index.add(np.sort(part))
    assert len(index.parts) < 8 and all((np.diff(part.astype(np.int64)) >= 0).all() for part in index.parts)
    assert np.array_equal(np.sort(np.concatenate(index.parts)), np.sort(values.ravel()))


@pytest.mark.parametrize(
    "value, said",
    [
        ("sometimes", "duplicates: is none of exact, near, keep"),
        ({"near": {"treshold": 0.8}}, "duplicates.near.treshold: unknown key. Did you mean 'threshold'"),
        ({"exact": False, "near": True}, "exact: false beside near"),
        ({"near": {"threshold": 1.5}}, "duplicates.near.threshold"),
    ],
)
def test_mistakes(tmp_path, value, said):
    with pytest.raises(UserError, match=re.escape(said)):
        corpora.config_of(tmp_path, tmp_path, "x.txt", duplicates=value)


def test_short_forms(tmp_path):
    def of(value):
        return json.loads(corpora.config_of(tmp_path, tmp_path, "x.txt", duplicates=value).duplicates.model_dump_json())

    assert of("near") == of({"near": True}) == of({"near": {"threshold": 0.8}}) and of("near")["near"]["ngram"] == 5
    assert of("exact") == {"exact": True, "near": None} == of({"near": False}) and of("keep")["exact"] is False
