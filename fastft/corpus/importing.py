"""Corpora of files that were tokenized elsewhere: datatrove's `.ds`, Megatron-LM's `.bin` and `.idx`. Tokens stay as
they are, and the tokenizer that they are said to be of is checked.
"""

from __future__ import annotations

import logging
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastft.corpus import output as folder_of
from fastft.corpus import tokens
from fastft.corpus.manifest import numbers, summed
from fastft.corpus.shards import FORMAT, MANIFEST, Corpus, Shard, ShardWriter, as_json, is_corpus
from fastft.corpus.tokenfiles import TokenFile, opened
from fastft.corpus.tokens import TokenizerFacts
from fastft.corpus.work import Count, Done, identity
from fastft.data.prepared import disk_told
from fastft.data.sources import fingerprint
from fastft.errors import UserError
from fastft.files import digest, replacing

log = logging.getLogger(__name__)
CODE = 1  # raise it when the same files give another corpus
SHARD_TOKENS = 1 << 26
PIECE = 1 << 20  # tokens that are looked at together, and at least one document
SAMPLE = 200  # documents of a file, at even distances, that are tokenized again
COMPARED, TORN = 25_000, 100  # first tokens of one that are, and the last of these, which a cut may change


@dataclass
class Checked:
    """What was found of the tokenizer.

    Attributes
    ----------
    again, sample : int
        Documents whose text gives the same tokens again, and how many were looked at.
    other : int or None
        The first document of the file whose text gives other ones.
    ended, begun : int
        Documents that have the tokenizer's special tokens at their end, and at their beginning.
    """

    again: int = 0
    sample: int = 0
    other: int | None = None
    ended: int = 0
    begun: int = 0


def import_tokens(
    output: Path,
    paths: list[str],
    tokenizer: str,
    *,
    name: str,
    licence: str | None = None,
    checked: bool = True,
    overwrite: bool = False,
) -> Corpus:
    """Make a corpus of token files, or open the one that was made from them.

    Parameters
    ----------
    paths : list of str
        ``.ds`` files, ``.bin`` or ``.idx`` files, or folders of them.
    tokenizer : str
        Folder or hub id.
    name, licence : str
        Of the source.
    checked : bool
        Refuse tokens whose text the tokenizer does not give back on more than half of up to 200 documents of a file.

    Raises
    ------
    UserError
        A file that is cut short or garbled, an id outside the vocabulary, tokens of another tokenizer, an output
        that is there.
    """
    if not paths:
        raise UserError("import-tokens: no file of tokens is given.", "Give .ds or .bin files, or folders of them.")
    files = opened(paths)
    facts = tokens.facts_of(tokenizer, None)
    found = fingerprint([path for file in files for path in file.paths], {})
    hashed = [[str(path), found[str(path)]["sha256"]] for file in files for path in file.paths]
    key = digest(["import", CODE, facts.key, hashed, name, licence])
    output.parent.mkdir(parents=True, exist_ok=True)
    with folder_of.alone(output):
        if is_corpus(output) and (corpus := Corpus(output)).manifest["key"] == key:
            corpus.verify()
            return corpus
        if output.exists() and not (is_corpus(output) and overwrite):
            hint = "replace it with --overwrite" if is_corpus(output) else "nothing was touched"
            raise UserError(f"{output}: is there already.", f"Choose another output; {hint}.")
        with disk_told(output.parent, "the corpus", "Make room and run again."), replacing(output) as scratch:
            scratch.mkdir()
            made = _Import(scratch, files, facts, checked)
            made.run(tokenizer)
            manifest = made.manifest(key, tokenizer, name, licence, found)
            folder_of.write(scratch / MANIFEST, {**manifest, "digest": digest(manifest)})
        return Corpus(output)


class _Import:
    def __init__(self, folder: Path, files: list[TokenFile], facts: TokenizerFacts, checked: bool):
        from tokenizers import Tokenizer

        self.folder, self.files, self.facts, self.must_fit = folder, files, facts, checked
        self.tokenizer = Tokenizer.from_str(facts.content)
        self.count, self.checked = Count(), Checked()
        self.shards: list[Shard] = []
        self.writer: ShardWriter | None = None
        self.looked = np.zeros(0, np.int64)  # documents of the file that are tokenized again

    def run(self, tokenizer: str) -> None:
        for number, file in enumerate(self.files):
            if file.tokenizer and Path(file.tokenizer).name != Path(tokenizer).name:
                log.warning("%s: says that its tokenizer is %s, not %s", file.path, file.tokenizer, tokenizer)
            again, sample, self.checked.other = self.checked.again, self.checked.sample, None
            self.looked = np.unique(np.linspace(0, len(file.ends) - 1, SAMPLE).astype(np.int64))
            for first, values, lengths in file.pieces(PIECE):
                self._take(number, file, first, values, lengths)
            self._close()
            self._fits(file, tokenizer, self.checked.again - again, self.checked.sample - sample)
        if not self.shards:
            raise UserError(f"{self.files[0].path}: holds no token.")

    def _fits(self, file: TokenFile, tokenizer: str, fits: int, sample: int) -> None:
        """UserError where less than half of a file's sample gives the same tokens again."""
        if self.must_fit and 2 * fits <= sample and fits < sample:
            assert self.checked.other is not None
            raise UserError(
                f"{file.path}: is not of the tokenizer {tokenizer}: of {sample} documents, the text of {fits} "
                f"gives the same tokens again; the first that does not is {file.path}:{self.checked.other + 1}.",
                "Give the tokenizer that made the files; or, where documents are parts of texts, --unchecked.",
            )

    def _take(self, number: int, file: TokenFile, first: int, values: np.ndarray, lengths: np.ndarray) -> None:
        facts, ends = self.facts, np.cumsum(lengths)
        wrong = np.flatnonzero((values < 0) | (values >= facts.vocabulary))
        if len(wrong):
            row = first + int(np.searchsorted(ends, wrong[0], side="right"))
            raise UserError(
                f"{file.path}:{row + 1}: token {int(values[wrong[0]])} is outside the tokenizer's vocabulary of "
                f"{facts.vocabulary:,}.",
                "Give the tokenizer that made the files.",
            )
        rows = np.split(values, ends[:-1])
        texts = self.tokenizer.decode_batch([row.tolist() for row in rows], skip_special_tokens=True)
        self._check(rows, first)
        self.count.rows += len(lengths)
        full = lengths > 0
        for row in np.flatnonzero(~full).tolist():
            self.count.drop(f"{file.path}:{first + row + 1}", "no token", "")
        if self.writer is not None and self.writer.tokens + len(values) > SHARD_TOKENS:
            self._close()
        if self.writer is None:
            folder = self.folder / "shards" / f"{len(self.shards):05d}"
            self.writer = ShardWriter(self.folder / ".shard", folder, 0, facts.dtype)
        places = np.stack([np.full(len(lengths), number), first + 1 + np.arange(len(lengths))], axis=1)
        done = Done(
            places.astype(np.int64),
            {number: ""},
            [identity(text) for text in texts],
            values.astype(facts.dtype),
            lengths,
            np.array([len(text) for text in texts], np.int64),
            {},
        )
        self.writer.append(done, full)

    def _check(self, rows: list[np.ndarray], first: int) -> None:
        """Count documents that begin and end with the tokenizer's special tokens, and tokenize some again.

        ``first``: number of the first one.
        """
        before, after, checked = self.facts.before, self.facts.after, self.checked
        looked = set(self.looked[np.searchsorted(self.looked, first) :][: len(rows)].tolist())
        for number, row in enumerate(rows, first):
            if not len(row):
                continue
            begun, ended = row[: len(before)].tolist() == before, row[len(row) - len(after) :].tolist() == after
            checked.begun += begun
            checked.ended += ended
            if number in looked:
                bare = row[len(before) if begun else 0 : len(row) - (len(after) if ended else 0)][:COMPARED].tolist()
                text = self.tokenizer.decode(bare, skip_special_tokens=False)
                checked.sample += 1
                # At a cut a word, or a letter of several bytes, may be torn.
                sure = COMPARED - TORN if len(bare) == COMPARED else len(bare) + 1
                same = self.tokenizer.encode(text, add_special_tokens=False).ids[:sure] == bare[:sure]
                checked.again += same
                checked.other = number if not same and checked.other is None else checked.other

    def _close(self) -> None:
        if self.writer is not None and self.writer.documents:
            self.shards.append(self.writer.close())
        elif self.writer is not None:
            self.writer.drop()
        self.writer = None

    def manifest(self, key: str, tokenizer: str, name: str, licence: str | None, found: dict) -> dict[str, Any]:
        from importlib.metadata import version

        from fastft import __version__

        facts, checked, kept = self.facts, self.checked, self.count.rows - self.count.dropped
        whole = checked.begun == checked.ended == kept
        if not whole:
            log.warning(
                "%d of %d documents end with the tokenizer's end-of-text tokens, %d begin with its first ones: they "
                "stay as they are",
                *(checked.ended, kept, checked.begun),
            )
        counts = numbers(self.count)
        said = [file.tokenizer for file in self.files if file.tokenizer]
        return {
            "format": FORMAT,
            "key": key,
            "made_by": {
                "fastft": __version__,
                "python": platform.python_version(),
                **{package: version(package) for package in ("numpy", "tokenizers")},
            },
            "settings": {"imported": [file.kind for file in self.files], "revision": None},
            "totals": summed(self.shards),
            "tokens": {
                "dtype": facts.dtype,
                "before": facts.before if whole else [],
                "after": facts.after if whole else [],
                "vocabulary": facts.vocabulary,
                "tokenizer": facts.key,
                "path": tokenizer,
                "encoder": "others",
                "because": f"imported; the text of {checked.again} of {checked.sample} documents gives the same tokens",
                "said": sorted(set(said)),
                "begin_with_special_tokens": checked.begun,
                "end_with_special_tokens": checked.ended,
            },
            "rules": {"reading": {**counts, "samples": self.count.samples}},
            "sources": [
                {
                    "name": name,
                    "licence": licence,
                    **summed(self.shards),
                    "rules": {"reading": counts},
                    "files": [
                        {"file": str(path), "sha256": found[str(path)]["sha256"], "bytes": path.stat().st_size}
                        for file in self.files
                        for path in file.paths
                    ],
                    "places": [f"{file.path}:" for file in self.files],
                }
            ],
            "shards": as_json(self.shards),
        }
