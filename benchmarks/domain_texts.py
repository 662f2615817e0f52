"""Texts of benchmarks/domains.py: what is trained on, what is held out, and the corpora that `fastft prepare` makes."""

import gzip
import hashlib
import json
import re
from pathlib import Path

from corpus import cleaned

from fastft.config.corpus import corpus_config
from fastft.corpus import build
from fastft.corpus.shards import Corpus

DOMAINS = ("medical", "legal", "finance", "education")
LICENCES = {
    "medical": "CC BY 4.0",
    "legal": "CC0",
    "finance": "public domain",
    "education": "CC BY-SA 4.0",
    "general": "CC BY-SA 3.0",
    "other": "public domain",
}
PASSAGE = 3000  # characters of a held-out document, from its middle: many begin with a list of names or of contents
PART = 4096  # bytes: documents are up to 100 times as long, and rules for web pages judge them whole
SPEECHES = 20  # of a document of the plays
ORDER = ("encoding", "unicode", "whitespace", "length", "repetition", "quality", "language", "decontaminate")
RULES = {**dict.fromkeys((*ORDER[:6], "personal_data"), True), "language": ["en"]}


def documents(data: Path, name: str) -> tuple[list[str], list[str]]:
    """(to train on, to hold out from) of a corpus: a domain, ``general`` (encyclopedia) or ``other`` (plays)."""
    if name == "general":
        train = _read(data / "general_wikitext2" / "train.txt.gz"), _read(data / "general_wikitext2" / "valid.txt")
        return _articles(train[0]), _articles(train[1])
    text = _read(data / {"other": "general_shakespeare"}.get(name, name) / "train.txt.gz")
    found = [part.strip() for part in text.split("\n\n") if part.strip()]
    if name == "other":
        found = ["\n".join(found[at : at + SPEECHES]) for at in range(0, len(found), SPEECHES)]
    return found, found


def _read(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()


def _articles(text: str) -> list[str]:
    """Of the WikiText form: a title is a line such as ``= Name =``; no blank lines within."""
    found = re.split(r"^(?= = [^=\n]+ = $)", text, flags=re.MULTILINE)
    return [re.sub(r"\n\s*", "\n", article).strip() for article in found if article.strip()]


def write_texts(data: Path, folder: Path, held: int, share: float = 1.0) -> None:
    """For every corpus <name>.txt (documents between blank lines), <name>.held.jsonl: passages of ``held`` documents,
    cleaned as the corpora are, which are not in the text. The documents are the first by the hashes of their texts.
    share: only so much of the others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*DOMAINS, "general", "other"):
        train, from_these = documents(data, name)
        long = {text for text in from_these if len(text) >= PASSAGE // 2}
        chosen = sorted(long, key=lambda text: hashlib.sha256(text.encode()).digest())[:held]
        rest = [text for text in train if text not in set(chosen)]
        rest = rest[: max(1, int(len(rest) * share))]
        passages = cleaned([_middle(text) for text in chosen], ("encoding", "unicode", "whitespace"))
        (folder / f"{name}.held.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in passages))
        (folder / f"{name}.txt").write_text("\n\n".join(rest) + "\n")


def _middle(text: str) -> str:
    at = text.find("\n", len(text) // 2) + 1 if len(text) > 2 * PASSAGE else 0
    return text[at : at + PASSAGE]


def held_out(folder: Path, name: str, characters: int, documents: int, output: Path) -> Path:
    """A file with the beginnings of so many held-out passages."""
    rows = [json.loads(line) for line in (folder / f"{name}.held.jsonl").read_text().splitlines()[:documents]]
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps({"text": row["text"][:characters]}) + "\n" for row in rows))
    return output


def prepare(folder: Path, name: str, tokenizer: str, output: Path, more: tuple[str, ...] = ()) -> Corpus:
    """The corpus of a text, without what is in any of the held-out passages or in ``more`` files; opened where it is
    there already.
    """
    held = [*more] + [str(folder / f"{one}.held.jsonl") for one in (*DOMAINS, "general", "other")]
    config = {
        "sources": {"path": str(folder / f"{name}.txt"), "name": name, "licence": LICENCES[name]},
        "output": str(output),
        "tokenizer": tokenizer,
        "rules": {**RULES, "decontaminate": held},
        "duplicates": "near",
        "max_document_bytes": PART,
        "workers": 2,
    }
    return build.prepare(corpus_config(config, name))


def told(corpus: Corpus) -> dict:
    """Of the manifest: tokens, documents, and by rule how many came in, were left out, changed, or masked."""
    rules = {
        rule: {key: said[key] for key in ("in", "dropped", "changed", "found") if said.get(key)}
        for rule, said in corpus.manifest["rules"].items()
    }
    why = corpus.manifest["rules"].get("duplicates", {}).get("reasons", {})
    return {**corpus.manifest["totals"], "rules": rules, "duplicates": why}
