"""Corpora for tests: configurations, and what a folder holds byte for byte."""

import hashlib
import json
from pathlib import Path

from fastft.config.corpus import CorpusConfig, corpus_config
from fastft.corpus import lines, reading
from fastft.corpus.build import prepare
from fastft.corpus.shards import Corpus

WORDS = ["the", "be", "to", "of", "and", "that", "have", "with", "from", "this", "when", "where", "which"]
WORDS += ["doctor", "patient", "court", "finance", "lesson"]


def config_of(folder: Path, tokenizer: Path, sources, **settings) -> CorpusConfig:
    """A configuration that writes to folder/out; sources as a file would say them."""
    raw = {"output": str(folder / "out"), "tokenizer": str(tokenizer), "sources": sources, "workers": 1, **settings}
    config = corpus_config(raw, "test")
    return config.changed(sources=[s.changed(name=s.name or "raw") for s in config.sources])


def made(folder: Path, tokenizer: Path, sources, **settings) -> Corpus:
    return prepare(config_of(folder, tokenizer, sources, **settings))


def content(folder: Path) -> dict[str, str]:
    """Every file and a hash of its bytes."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def prose(number: int, words: int = 60) -> str:
    """A text of its own for each number."""
    return " ".join(WORDS[(number * 7 + i * i) % len(WORDS)] + str(number % 13) * (i % 5 == 0) for i in range(words))


def jsonl(path: Path, texts, **more) -> Path:
    path.write_text("".join(json.dumps({"text": text, **more}, ensure_ascii=False) + "\n" for text in texts))
    return path


def texts_of(corpus: Corpus, tokenizer) -> list[str]:
    """All documents, decoded."""
    rows = (corpus.tokens(i)[d] for i in range(len(corpus.shards)) for d in range(corpus.shards[i].documents))
    return [tokenizer.decode(row.astype("int64"), skip_special_tokens=True) for row in rows]


def small_blocks(monkeypatch, rows: int) -> None:
    """So few rows are worked on together; of JSON lines, those in 100 bytes for each."""
    monkeypatch.setattr(reading, "BLOCK_ROWS", rows)
    monkeypatch.setattr(lines, "SIZE", 100 * rows)
