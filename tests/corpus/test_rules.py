"""The rules one by one, and the encoder that they end in."""

import gzip
import random
from collections import Counter

import corpora
import numpy as np
import pytest
import transformers

from fastft import rooms
from fastft.corpus import build, tokens
from fastft.corpus.rules.base import Document
from fastft.errors import UserError


def applied(name: str, text: str, **settings) -> tuple[str, str | None]:
    """The text afterwards, and why it is left out."""
    kind = rooms.RULES.get(name)
    document, rule = Document(text), kind(kind.Settings(**settings))
    rule.look([document])
    reason = rule.apply(document)
    return document.text, reason


def test_rules_run_repairs_before_judgements():
    orders = {name: rooms.RULES.get(name).order for name in rooms.RULES.names()}
    assert len(set(orders.values())) == len(orders)
    assert sorted(orders, key=orders.get)[:3] == ["encoding", "unicode", "whitespace"]


def test_encoding():
    pytest.importorskip("ftfy", reason="pip install 'fastft[data]'")
    text = "a schÃ¶ner line\nand “quotes” that are right"
    assert applied("encoding", text) == ("a schöner line\nand “quotes” that are right", None)
    assert applied("encoding", "lost \ufffd\ufffd")[1] == "replacement characters"
    assert applied("encoding", "lost \ufffd\ufffd", max_replaced=1.0)[1] is None


def test_unicode():
    assert applied("unicode", "cafe\u0301 \ufb01\r\nx\u200by\x00z")[0] == "caf\xe9 \ufb01\nxyz"
    assert applied("unicode", "\ufb01", form="NFKC")[0] == "fi"
    assert applied("unicode", "a\u200bb", remove_controls=False)[0] == "a\u200bb"


@pytest.mark.parametrize(
    "text, plain, indented",
    [
        ("  a  b\t c \n\n\n\n  d\u00a0e\n", "a b c\n\nd e", "  a  b\t c\n\n  d\u00a0e"),
        ("a\u3000b", "a b", "a\u3000b"),
        ("a\nb", "a\nb", "a\nb"),
    ],
)
def test_whitespace(text, plain, indented):
    assert applied("whitespace", text)[0] == plain
    assert applied("whitespace", text, indentation=True)[0] == indented


def plainly(words: list[str], limits) -> str | None:
    """What the repetition rule says of runs of words, written the slow way."""
    whole = sum(map(len, words))
    for n in range(2, 11):
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        counts = Counter(grams)
        top = max(counts.values(), default=0)
        if top < 2:
            return None
        first = next(gram for gram in grams if counts[gram] == top)
        if n in limits.top_ngrams and top * sum(map(len, first)) > limits.top_ngrams[n] * whole:
            return f"most frequent {n}-gram"
        covered = {at for i, gram in enumerate(grams) if gram in grams[:i] for at in range(i, i + n)}
        if n in limits.duplicate_ngrams and sum(len(words[i]) for i in covered) > limits.duplicate_ngrams[n] * whole:
            return f"duplicate {n}-grams"
    return None


def test_repetition_is_its_definition():
    kind, rng, said = rooms.RULES.get("repetition"), random.Random(0), Counter()
    limits = kind.Settings()
    rule = kind(limits)
    for size in (1, 1, 2, 7, 89, 300):  # documents that are looked at together
        texts = []
        for _ in range(size):
            vocabulary = rng.choice([5, 20, 60, 300])
            words = [f"w{rng.randrange(vocabulary)}" * rng.randint(1, 3) for _ in range(rng.randint(0, 90))]
            texts.append(words + words[3 : rng.choice([3, 3, 12, 20])])
        documents = [Document(" ".join(words)) for words in texts]
        rule.look(documents)
        for document, words in zip(documents, texts, strict=True):
            reason = rule.apply(document)
            assert reason == plainly(words, limits), words
            said[reason] += 1
    assert len(said) >= 5, said
    assert applied("repetition", "one line\nanother one\none line\none line")[1] == "duplicate lines"


@pytest.mark.parametrize(
    "text, reason",
    [
        (corpora.prose(1, 80), None),
        ("the of " * 10, "number of words"),
        ("a b c d e f g h i the of " * 10, "mean length of words"),
        ("the of hashing # words ### are ##### never " * 10, "number signs"),
        ("- the of all the bullet points are never prose\n" * 10, "lines that begin with a bullet"),
        ("and the words go on and on of course with that and more of it...\n" * 10, "lines that end with an ellipsis"),
        ("the of 1234 5678 " * 20, "words without letters"),
        ("ein deutscher Satz ohne englische Wörter darin " * 10, "stop words"),
    ],
)
def test_quality(text, reason):
    assert applied("quality", text)[1] == reason


def test_words_of_scripts_without_spaces():
    assert Document("中文 is 好").words == ["中", "文", "is", "好"] and Document("naïve “one”").words == [
        "naïve",
        "“one”",
    ]
    assert applied("length", "中文的文件内容", min_words=7, min_characters=1)[1] is None


def test_language():
    pytest.importorskip("lingua", reason="pip install 'fastft[data]'")
    kind = rooms.RULES.get("language")
    rule = kind(kind.Settings(keep=["en"]))
    assert rule.apply(Document("This is a sentence in plain English about the weather.")) is None
    assert rule.apply(Document("Dies ist ein einfacher deutscher Satz über das Wetter.")) == "language de"
    with pytest.raises(UserError, match="'xx' is no language known"):
        kind(kind.Settings(keep=["xx"]))


@pytest.fixture(scope="module")
def facts(tiny_llama):
    return tokens.facts_of(str(tiny_llama), None)


def test_gigatoken_gives_the_tokenizers_ids_on_real_text(facts, shared_data):
    """Every ninth document of six corpora; and text with what vocabularies lack."""
    pytest.importorskip("gigatoken", reason="pip install 'fastft[data]'")
    texts = ["", "\x04 control", "<eos>", "中文 \U0001f600 é\x85", "a" * 5000]
    for path in sorted((shared_data / "corpus").glob("*/train.txt.gz")):
        texts += [text[:20_000] for text in gzip.decompress(path.read_bytes()).decode().split("\n\n")[::9]]
    fast, plain = (tokens.Encoder(facts, fast) for fast in (True, False))
    for got, right in zip(fast.encode(texts), plain.encode(texts), strict=True):
        assert np.array_equal(got, right)
    assert tokens.choose(facts, "auto", texts)[0]


def test_a_vocabulary_without_some_bytes(tmp_path, tiny_llama):
    """gigatoken refuses it as it is: SmolLM2's has no token for 21 bytes."""
    pytest.importorskip("gigatoken", reason="pip install 'fastft[data]'")
    import json

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    del content["model"]["vocab"]["\u0124"]  # the byte 0x04
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    loaded = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<eos>")
    loaded.save_pretrained(tmp_path)
    found = tokens.facts_of(str(tmp_path), None)
    texts = ["a plain text", "with \x04 in it", "and another"]
    fast, plain = (tokens.Encoder(found, fast).encode(texts) for fast in (True, False))
    assert all(np.array_equal(a, b) for a, b in zip(fast, plain, strict=True))


def test_fallbacks_say_why(facts, monkeypatch, tmp_path, tiny_llama, caplog):
    """Not installed; other ids on the sample; other ids on a later document."""
    assert tokens.choose(facts, "tokenizers", ["a"]) == (False, "asked for")

    class Wrong:
        def __init__(self, facts):
            pass

        def encode(self, texts, plain):
            values, lengths = plain(texts)
            return np.where(values == plain(["q"])[0][0], 0, values), lengths

    monkeypatch.setattr(tokens, "_Gigatoken", Wrong)
    assert tokens.choose(facts, "auto", ["a quick one", "abc"]) == (
        False,
        "gigatoken gives other ids on 1 of 2 documents",
    )
    with pytest.raises(UserError, match="encoder: gigatoken gives other ids"):
        tokens.choose(facts, "gigatoken", ["a quick one"])
    monkeypatch.setattr(build.Build, "_sample", lambda self: ["abc"])
    corpora.jsonl(tmp_path / "t.jsonl", ["abc abc abc", "a quick"])
    corpus = corpora.made(tmp_path, tiny_llama, str(tmp_path / "t.jsonl"))
    said = corpus.manifest["tokens"]
    assert said["encoder"] == "tokenizers" and said["because"] == "gigatoken gave other ids for a document"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    assert corpora.texts_of(corpus, tokenizer) == ["abc abc abc", "a quick"]

    def missing(facts):
        raise ImportError("gigatoken")

    monkeypatch.setattr(tokens, "_Gigatoken", missing)
    assert tokens.choose(facts, "auto", ["a"]) == (False, "gigatoken is not installed")
