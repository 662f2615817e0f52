"""The JSON Schema of a corpus's file takes what the loader takes, and refuses what it refuses."""

import jsonschema
import pytest

from fastft import config as configuration
from fastft import rooms
from fastft.config.corpus import CorpusConfig, corpus_config
from fastft.errors import UserError

VALIDATOR = jsonschema.Draft7Validator(configuration.json_schema(["txt", "jsonl"], CorpusConfig))
MINIMAL = {"output": "out", "tokenizer": "t", "sources": "x.txt"}

GOOD = [
    {},
    {"sources": ["a.txt", {"path": "b", "format": "jsonl", "text": "body", "licence": None}]},
    {"sources": {"path": "b", "documents": "line"}},
    {"rules": None, "duplicates": None},
    {"rules": "unicode"},
    {"rules": ["unicode", {"length": {"min_words": 5}}]},
    {"rules": {"length": {"max_words": None}, "unicode": True, "quality": False, "whitespace": None}},
    {"rules": {"unicode": "NFKC", "language": ["en", "de"]}},
    {"rules": {"repetition": {"top_ngrams": {"2": 0.5}}}},
    {"rules": {"decontaminate": "eval.jsonl"}},
    {"rules": [{"decontaminate": ["a.jsonl", {"path": "b.jsonl", "texts": ["question"]}]}]},
    {"rules": {"decontaminate": {"sets": {"path": "b.jsonl", "texts": None}, "ngram": 10, "share": "5e-1"}}},
    {"rules": {"personal_data": {"kinds": ["email"], "write": {"email": "x"}}}},
    *({"duplicates": name} for name in ("exact", "near", "keep")),
    {"duplicates": {"near": True}},
    {"duplicates": {"near": {"threshold": 0.9, "bands": None, "rows": 4}, "exact": "yes"}},
    *({"executor": name} for name in ("local", "ray", None)),
    {"executor": {"ray": {"address": "auto"}}},
    {"executor": {"slurm": True}, "workers": 4},
    {"executor": {"slurm": {"partition": "p", "time": "2:00:00", "options": ["--mem=8G"]}}, "workers": 4},
    {"workers": 4, "encoder": "tokenizers", "shard_tokens": "1_000"},
    *({"rules": [name]} for name in rooms.RULES.names() if name not in ("language", "decontaminate")),
]
BAD = [
    {"output": None},
    {"sources": {"path": "a", "txt": "b"}},
    {"rules": ["lenght"]},
    {"rules": {"length": {"min_word": 5}}},
    {"rules": {"language": {}}},
    {"rules": {"decontaminate": {"ngram": 5}}},
    {"rules": {"personal_data": {"kinds": ["name"]}}},
    {"duplicates": "none"},
    {"duplicates": {"near": {"threshold": 2}}},
    {"duplicates": {"nearly": True}},
    {"workers": 0},
    {"executor": "spark"},
    {"executor": {"slurm": {"partitions": "p"}}, "workers": 4},
    {"tokeniser": "x"},
]


@pytest.mark.parametrize("change", GOOD, ids=str)
def test_what_both_take(change):
    VALIDATOR.validate(MINIMAL | change)
    corpus_config(MINIMAL | change, "test")


@pytest.mark.parametrize("change", BAD, ids=str)
def test_what_both_refuse(change):
    assert not VALIDATOR.is_valid(MINIMAL | change)
    with pytest.raises(UserError):
        corpus_config(MINIMAL | change, "test")
