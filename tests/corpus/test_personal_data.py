"""The rule `personal_data`: what is masked, and what looks alike and is not.

``benchmarks/personal_data.py`` is the same with more of each, and writes the table.
"""

import random
import sys

import corpora
import pytest
import transformers

import launch
from fastft import rooms
from fastft.corpus.rules.base import Document
from fastft.errors import UserError

pytest.importorskip("phonenumbers", reason="pip install 'fastft[data]'")
pytest.importorskip("stdnum", reason="pip install 'fastft[data]'")
sys.path.insert(0, str(launch.ROOT / "benchmarks"))
import personal_data as made_up


def rule(**settings):
    kind = rooms.RULES.get("personal_data")
    return kind(kind.Settings(**settings))


def applied(text: str, **settings) -> str:
    document = Document(text)
    assert rule(**settings).apply(document) is None
    return document.text


@pytest.mark.parametrize("kind", made_up.KINDS)
def test_planted_ones_are_masked_wholly(kind):
    assert made_up.outcome(rule(), kind, made_up.KINDS[kind], 150, random.Random(0)) >= 0.98


@pytest.mark.parametrize("kind", made_up.NONE)
def test_what_looks_alike_stays(kind):
    assert made_up.outcome(rule(), kind, made_up.NONE[kind], 150, random.Random(0)) <= 0.01


@pytest.mark.parametrize(
    "text, masked",
    [
        ("<j@d.org> and a.b+c@x-y.co.uk, not @x or a@b", "<<EMAIL>> and <EMAIL>, not @x or a@b"),
        ("(212) 555-0123, 212-555-0199, 2125550123", "<PHONE>, <PHONE>, 2125550123"),
        ("my phone: 2125550123, order 2125550123", "my phone: <PHONE>, order 2125550123"),
        ("4111 1111 1111 1111 or 4111 1111 1111 1112", "<CARD> or 4111 1111 1111 1112"),
        ("GB29 NWBK 6016 1331 9268 19; GB28 NWBK 6016 1331 9268 19", "<IBAN>; GB28 NWBK 6016 1331 9268 19"),
        ("121-10-3456, 666-10-3456, SSN 121103456, 121103456", "<US_SSN>, 666-10-3456, SSN <US_SSN>, 121103456"),
        ("12345678Z 12345678A X1234567L", "<ES_ID> 12345678A <ES_ID>"),
        ("8.8.8.8, version 8.8.8.8, 8.8.8.8.8, 300.1.1.1", "<IP>, version 8.8.8.8, 8.8.8.8.8, 300.1.1.1"),
        ("fe80::1ff:fe23:4567:890a, a::b, 12:30:45", "<IP>, a::b, 12:30:45"),
        ("手机13800138000", "手机13800138000"),  # no number of the United States
    ],
)
def test_kinds(text, masked):
    assert applied(text) == masked


def test_settings():
    text = "a@b.org 8.8.8.8 手机13800138000, 030 901820"
    assert applied(text, kinds="email", write={"email": "[mail]"}) == "[mail] 8.8.8.8 手机13800138000, 030 901820"
    assert applied(text, kinds=["phone"], regions=["CN", "DE"]) == "a@b.org 8.8.8.8 手机<PHONE>, <PHONE>"
    assert applied("+86 138 0013 8000, 212-555-0123", regions=[]) == "<PHONE>, 212-555-0123"
    with pytest.raises(UserError, match="regions: 'XX' is no country"):
        rule(regions=["XX"])


def test_what_was_masked_is_counted(tmp_path, tiny_llama):
    texts = [
        "Write to a@b.org or c@d.org, or call 212-555-0123 now.",
        "Nothing personal is in here.",
        "ip 8.8.8.8 is one",
    ]
    corpora.jsonl(tmp_path / "t.jsonl", texts)
    corpus = corpora.made(tmp_path, tiny_llama, str(tmp_path / "t.jsonl"), rules="personal_data", workers=2)
    told = corpus.manifest["rules"]["personal_data"]
    assert told["found"] == {"email": 2, "ip": 1, "phone": 1} and told["changed"] == 2 and told["dropped"] == 0
    found = corpora.texts_of(corpus, transformers.AutoTokenizer.from_pretrained(tiny_llama))
    assert found[0] == "Write to <EMAIL> or <EMAIL>, or call <PHONE> now." and found[1] == texts[1]
